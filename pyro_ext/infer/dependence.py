"""Which observed and factor sites depend on the particle, where no dim of theirs tells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance

from pyro_ext.infer.plates import DensitySite
from pyro_ext.infer.random_state import get_random_state, set_random_state


@dataclass(frozen=True)
class Provenance:
    """The observed sites of one run, as (program, name), and those that depend on a latent one."""

    observed: frozenset[tuple[str, str]] = frozenset()
    dependent: frozenset[tuple[str, str]] = frozenset()


def track_provenance(
    model: Callable, guide: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> Provenance:
    """Runs both programs once on tensors that carry the names of the sites they come from.

    The random state stays as it was.
    """
    state = get_random_state()
    with poutine.block(), torch.no_grad(), TrackProvenance():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    set_random_state(state)
    latent = {name for name, _ in guide_trace.iter_stochastic_nodes()}
    observed, dependent = set(), set()
    for program, trace in (("model", model_trace), ("guide", guide_trace)):
        for name in trace.observation_nodes:
            site: Any = trace.nodes[name]
            log_prob = site["fn"].log_prob(site["value"])
            tensors = [x for x in (log_prob, site["mask"], site["scale"]) if torch.is_tensor(x)]
            observed.add((program, name))
            if any(get_provenance(x) & latent for x in tensors):
                dependent.add((program, name))
    return Provenance(frozenset(observed), frozenset(dependent))


def differs_between(by_particle: Sequence[Sequence[DensitySite]], site: DensitySite) -> bool:
    """Whether a site's log-probability is not the same in every particle.

    Provenance is lost in compiled code and in writes into buffers; values are not.
    """
    same = [s for row in by_particle for s in row if (s.program, s.name) == site[:2]]
    return len(same) < len(by_particle) or not all(
        torch.equal(s.log_prob, site.log_prob) for s in same
    )
