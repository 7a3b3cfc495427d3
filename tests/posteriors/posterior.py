"""A table of posteriors with known evidence, which the files of this folder fill."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ext.tracing import Program


@dataclass(frozen=True, eq=False)
class Posterior:
    """A model of continuous latents, with its data and its log evidence.

    :ivar model: the model.
    :ivar args: the data, in float64: the arguments of the model and of its guides.
    :ivar log_evidence: log p(data), in nats.
    :ivar log_evidence_error: its standard error; 0 for a closed form or a quadrature.
    :ivar guides: a dict from a name to a function that makes a guide from the model.
    :ivar start: the name of the guide from which annealed samplers start; None for the prior.
    """

    model: Program
    args: tuple[Any, ...]
    log_evidence: float
    log_evidence_error: float = 0.0
    guides: dict[str, Callable[[Program], Program]] = field(default_factory=dict)
    start: str | None = None

    def guide(self, name: str | None, num_steps: int = 1000) -> Program | None:
        """Return a guide, trained if it has parameters, or None for the prior.

        :param name: a key of ``guides``, or None.
        :param num_steps: the number of steps of training.
        """
        if name is None:
            return None
        guide = self.guides[name](self.model)
        pyro.clear_param_store()
        guide(*self.args)
        if isinstance(guide, torch.nn.Module):
            optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / num_steps)})
            elbo = Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=1)
            svi = SVI(self.model, guide, optim, elbo)
            for _ in range(num_steps):
                svi.step(*self.args)
        return guide


#: name -> a function that returns the posterior
POSTERIORS: dict[str, Callable[[], Posterior]] = {}


def posterior(build: Callable[[], Posterior]) -> Callable[[], Posterior]:
    """Add the decorated function to the table, under its own name."""
    assert build.__name__ not in POSTERIORS
    POSTERIORS[build.__name__] = build
    return build
