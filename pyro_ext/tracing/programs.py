"""A model and a guide with their arguments, passed on as one value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_ext.tracing.combined_draws import CombinedDraws
from pyro_ext.tracing.enumeration import ModelEnumeration
from pyro_ext.tracing.plate_sizes import set_plate_sizes

#: A callable with Pyro primitives.
Program = Callable[..., Any]


@dataclass(frozen=True)
class Programs:
    """A model and a guide, with the arguments of both."""

    model: Program
    guide: Program
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def without_arguments(self) -> "Programs":
        """The model and guide without arguments, to remember them but not their data."""
        return Programs(self.model, self.guide)

    @property
    def guide_runs_model(self) -> bool:
        """Whether the guide is a GuideMessenger, which runs the model itself."""
        return isinstance(poutine.unwrap(self.guide), Messenger)

    def is_same_pair(self, other: "Programs | None") -> bool:
        """Return whether another value has the same model and the same guide."""
        return (
            other is not None
            and _is_same(self.model, other.model)
            and _is_same(self.guide, other.guide)
        )

    def each_under(self, for_model: Any, for_guide: Any) -> "Programs":
        """Return a copy with the model and the guide each inside an effect handler.

        :param for_model: the handler of the model.
        :param for_guide: the handler of the guide.
        """
        return Programs(for_model(self.model), for_guide(self.guide), self.args, self.kwargs)

    def enumerated(self, first_available_dim: int) -> "Programs":
        """Return a copy whose model enumerates the sites that are marked for it.

        :param first_available_dim: the dim to the left of all plates, negative.
        """
        model = ModelEnumeration(first_available_dim)(self.model)
        return Programs(model, self.guide, self.args, self.kwargs)

    def combined(self, num_draws: int, first_available_dim: int) -> "Programs":
        """Return a copy whose guide draws each site several times, along a dim of its own.

        The model enumerates the sites that are marked for it.

        :param num_draws: the number of draws of each site.
        :param first_available_dim: the dim to the left of all plates, negative.
        """
        guide = CombinedDraws(num_draws, first_available_dim)(self.guide)
        return Programs(ModelEnumeration()(self.model), guide, self.args, self.kwargs)

    @torch.no_grad()
    def run(self) -> dict[str, Trace]:
        """Run the guide, then the model against it, and return both traces.

        The run is hidden from the effect handlers around it.
        """
        with poutine.block():
            guide = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            handler = poutine.trace(poutine.replay(self.model, guide))
            model = handler.get_trace(*self.args, **self.kwargs)
        set_plate_sizes(model, guide)
        return {"model": model, "guide": guide}

    def importance_traces(self, max_plate_nesting: float) -> tuple[Trace, Trace]:
        """Return Pyro's traces of model and guide, with log-probabilities and Pyro's checks."""
        model, guide = get_importance_trace(
            "flat", max_plate_nesting, self.model, self.guide, self.args, self.kwargs
        )
        set_plate_sizes(model, guide)
        return model, guide


def _is_same(program: Program, other: Program) -> bool:
    # A bound method is a new object at each access. For other callables, == may not give a bool.
    return program is other or (isinstance(program, MethodType) and bool(program == other))
