"""Many particles at the memory of a few: the graph of one chunk of particles at a time.

A first pass without a graph yields all the log weights, hence the coefficients of every particle.
A second one runs each chunk again from the same random state and differentiates a surrogate that is
linear in its particles.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._random_states import (
    RandomStates,
    kept_random_states,
    random_states,
    set_random_states,
)
from pyro_ext.infer.gradients.rules import Bound, GradientRule
from pyro_ext.tracing.failures import raise_not_finite
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.shared_values import SharedSubsamples

TraceChunk = Callable[[int, SharedSubsamples, bool], Particles]


class TwoPass:
    """Runs particles chunk by chunk, twice.

    :param trace: traces a number of particles under given minibatch indices, with leaves or
        without.
    :param int num_particles: the number of all particles.
    :param int chunk_size: how many run at once, but for the last chunk.
    """

    def __init__(self, trace: TraceChunk, num_particles: int, chunk_size: int) -> None:
        self.trace = trace
        starts = range(0, num_particles, chunk_size)
        self.chunks = [slice(start, min(start + chunk_size, num_particles)) for start in starts]
        self.states: list[RandomStates] = []

    @torch.no_grad()
    def weigh(self) -> tuple[Float[Tensor, "K *common"], Particles]:
        """The first pass: all log weights without a graph, and the last chunk."""
        subsamples = SharedSubsamples()
        log_w = []
        for chunk in self.chunks:
            self.states.append(random_states())
            particles = self.trace(chunk.stop - chunk.start, subsamples, False)
            if particles.log_w.isnan().any():
                raise_not_finite("A log weight", math.nan, particles)
            log_w.append(particles.log_w)
        return torch.cat(log_w), particles

    def differentiate(
        self, rule: GradientRule, linear: "LinearBound", retain_graph: bool | None
    ) -> None:
        """The second pass: adds the gradients of a rule's objective, negated, to ``.grad``."""
        for chunk, particles in self._again(rule.needs_leaves(linear)):
            if chunk.start > 0:  # terms that no particle changes count once
                particles = replace(particles, outer_terms=())
            surrogate = -rule.objective(linear.part(chunk), particles)
            if surrogate.requires_grad:
                surrogate.backward(retain_graph=retain_graph)
            del particles, surrogate

    def _again(self, has_leaves: bool) -> Iterator[tuple[slice, Particles]]:
        # Of its own: the minibatch is drawn again, as in the first pass.
        subsamples = SharedSubsamples()
        with kept_random_states():
            for chunk, state in zip(self.chunks, self.states, strict=True):
                set_random_states(state)
                # Nothing of one chunk is to live while another runs.
                yield chunk, self.trace(chunk.stop - chunk.start, subsamples, has_leaves)


class LinearBound(NamedTuple):
    """A bound of K particles for given log weights: the linear function with its derivatives.

    Being linear, it can be taken in parts, one chunk of particles at a time.

    :ivar first: the bound's derivatives at the log weights, ``(K, *common)``.
    :ivar second: its pure second derivatives, likewise.
    :ivar signal: its learning signal, likewise; None if no site needs one.
    :ivar own_guide_bound: the linear bound of the guide; None if it is this one.
    """

    first: Float[Tensor, "K *common"]
    second: Float[Tensor, "K *common"]
    signal: Float[Tensor, "K *common"] | None
    own_guide_bound: "LinearBound | None"

    def part(self, particles: slice) -> "LinearBound":
        """The same for some of the particles."""
        own = self.own_guide_bound
        return LinearBound(
            self.first[particles],
            self.second[particles],
            None if self.signal is None else self.signal[particles],
            None if own is None else own.part(particles),
        )

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        """The linear function; its value means nothing."""
        # Weights of zero have zero coefficients: 0 x inf would be NaN.
        return (self.first * log_w.masked_fill(log_w.isinf(), 0.0)).sum(0)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """The derivatives, whatever the log weights."""
        return self.first, self.second

    def learning_signal(self, log_w: Tensor) -> Any:
        """The learning signal, whatever the log weights."""
        return self.signal

    @property
    def guide_bound(self) -> "LinearBound":
        """The bound that the guide is trained on."""
        return self if self.own_guide_bound is None else self.own_guide_bound


def linearize(bound: Bound, log_w: Float[Tensor, "K *common"], has_score: bool) -> LinearBound:
    """The linear function with the derivatives of a bound at the log weights of all particles.

    :param bool has_score: whether the guide has non-reparameterised sites.
    """
    guide_bound = bound.guide_bound
    return LinearBound(
        *bound.derivatives(log_w),
        signal=bound.learning_signal(log_w) if has_score else None,
        own_guide_bound=None if guide_bound is bound else linearize(guide_bound, log_w, has_score),
    )
