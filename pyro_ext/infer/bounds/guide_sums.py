"""Exact sums over sites of the guide that are marked for enumeration, for one particle."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from pyro.infer import TraceEnum_ELBO

from pyro_ext._random_states import random_states, set_random_states
from pyro_ext.tracing import Program, Programs
from pyro_ext.tracing.sites import EnumeratedGuideError

Method = TypeVar("Method", bound=Callable[..., Any])


def or_trace_enum_elbo(method: Method) -> Method:
    """Decorate a method of an ELBO, which Pyro's ``TraceEnum_ELBO`` takes over where it must.

    With one particle, every bound is the ELBO, whose sum over the values of a guide site is exact.
    """

    @wraps(method)
    def call(self: Any, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        if self.num_particles > 1:
            return method(self, model, guide, *args, **kwargs)
        memory = self._memory.recall(Programs(model, guide))
        if memory.trace_enum_elbo is None:
            states = random_states() if memory.enumerates is None else None
            try:
                return method(self, model, guide, *args, **kwargs)
            except EnumeratedGuideError:
                memory.trace_enum_elbo = TraceEnum_ELBO(max_plate_nesting=self.max_plate_nesting)
            if states is not None:
                set_random_states(states)
        return getattr(memory.trace_enum_elbo, method.__name__)(model, guide, *args, **kwargs)

    return call  # type: ignore[return-value]
