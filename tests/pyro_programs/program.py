"""A table of model and guide pairs, which the files of this folder fill."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO

#: A model, a guide, and the positional and keyword arguments of both.
Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Builder = Callable[[], Pair]


@dataclass(frozen=True)
class Program:
    """A model and guide pair with the shape of one of Pyro's examples.

    :ivar build_pair: a function that returns the pair.
    :ivar make_elbo: a function that returns the ELBO of Pyro that trains the pair.
    :ivar enumerated: whether a discrete site must be summed out.
    :ivar one_at_a_time: whether the pair cannot take an extra dim on the left of its samples.
    """

    name: str
    build_pair: Builder
    make_elbo: Callable[[], ELBO]
    enumerated: bool
    one_at_a_time: bool

    def build(self) -> Pair:
        """Return the pair, with an empty parameter store and a fixed seed."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return self.build_pair()


def masked(mask: Any) -> Any:
    """Pyro's mask, whose annotation leaves out the result of a comparison of tensors."""
    return poutine.mask(mask=mask)


PROGRAMS: dict[str, Program] = {}


def program(
    *,
    enumerated: bool = False,
    one_at_a_time: bool = False,
    elbo: Callable[[], ELBO] | None = None,
) -> Callable[[Builder], Builder]:
    """Add the decorated function to the table, under its own name."""

    def add(builder: Builder) -> Builder:
        make_elbo = elbo or (TraceEnum_ELBO if enumerated else Trace_ELBO)
        name = builder.__name__
        assert name not in PROGRAMS
        PROGRAMS[name] = Program(name, builder, make_elbo, enumerated, one_at_a_time)
        return builder

    return add
