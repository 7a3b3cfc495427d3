"""Which observed and factor sites depend on the particle, where no dim of theirs tells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine.util import site_is_subsample

from pyro_ext.infer.handlers import lies_in
from pyro_ext.infer.plates import DensitySite
from pyro_ext.ops.random_state import get_random_state, set_random_state


@dataclass(frozen=True)
class Provenance:
    """The sites of one run, as (program, name), and those that depend on what particles differ by.

    A latent site is only looked at outside of a local plate.
    """

    seen: frozenset[tuple[str, str]] = frozenset()
    dependent: frozenset[tuple[str, str]] = frozenset()


def track_provenance(
    model: Callable,
    guide: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    local_plate: str | None,
) -> Provenance:
    """Runs both programs once on tensors that carry the names of the sites they come from.

    The random state stays as it was.

    :param str local_plate: the plate that holds the particles; None if they are around all.
    """
    state = get_random_state()
    with poutine.block(), torch.no_grad(), _TrackDraws():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    set_random_state(state)
    latent = {
        name
        for name, site in guide_trace.iter_stochastic_nodes()
        if local_plate is None or lies_in(site, local_plate)
    }
    seen, dependent = set(), set()
    for program, trace in (("model", model_trace), ("guide", guide_trace)):
        site: Any
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            seen.add((program, name))
            is_outside = local_plate is not None and not lies_in(site, local_plate)
            if (site["is_observed"] or is_outside) and _provenance(site) & latent:
                dependent.add((program, name))
    return Provenance(frozenset(seen), frozenset(dependent))


class _TrackDraws(TrackProvenance):
    """Leaves parameters alone, which a subsampled plate has to recognise."""

    def _pyro_post_param(self, msg: Any) -> None:
        pass


def _provenance(site: Any) -> frozenset[str]:
    try:
        log_prob = site["fn"].log_prob(site["value"])
    except NotImplementedError:  # a draw of a flow without an inverse, no longer cached
        log_prob = None
    tensors = [x for x in (log_prob, site["mask"], site["scale"]) if torch.is_tensor(x)]
    return frozenset().union(*map(get_provenance, tensors))


def differs_between(by_particle: Sequence[Sequence[DensitySite]], site: DensitySite) -> bool:
    """Whether a site's log-probability is not the same in every particle.

    Provenance is lost in compiled code and in writes into buffers; values are not.
    """
    same = [s for row in by_particle for s in row if (s.program, s.name) == site[:2]]
    return len(same) < len(by_particle) or not all(
        torch.equal(s.log_prob, site.log_prob) for s in same
    )
