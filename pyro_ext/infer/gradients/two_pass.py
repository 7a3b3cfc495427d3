"""Gradients of many particles with the memory of a few: one chunk of particles at a time.

The first pass, without a graph, yields all log weights and so the coefficients of every particle.
The second pass runs each chunk again from the same random state. It differentiates a surrogate that
is linear in the particles of the chunk.
"""

import math
from collections.abc import Iterator
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
from pyro_ext.tracing import ParticleTracer, Programs
from pyro_ext.tracing.failures import raise_not_finite
from pyro_ext.tracing.leaves import Leaves
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.shared_values import SharedSubsamples


class TwoPass:
    """A loop over chunks of particles, which runs them twice.

    :param tracer: the tracer of the estimator.
    :param programs: the model and guide.
    :param chunk_size: the number of particles at once. The last chunk may have fewer.
    """

    def __init__(self, tracer: ParticleTracer, programs: Programs, chunk_size: int) -> None:
        # The coefficients of the chunks are those of the common plates.
        self.tracer = replace(tracer, splits_rewards=False)
        self.programs = programs
        K = tracer.num_particles
        self.chunks = [slice(i, min(i + chunk_size, K)) for i in range(0, K, chunk_size)]
        self.states: list[RandomStates] = []
        tracer.run_first(programs)  # a first run may draw initial values: not in a pass

    def _trace(
        self, chunk: slice, subsamples: SharedSubsamples, leaves: Leaves = Leaves.NOWHERE
    ) -> Particles:
        return self.tracer.trace(self.programs, chunk.stop - chunk.start, subsamples, leaves)

    @torch.no_grad()
    def weigh(self) -> tuple[Float[Tensor, "K *common"], Particles]:
        """Run the first pass, and return all log weights and the particles of the last chunk."""
        subsamples = SharedSubsamples()
        log_w = []
        for chunk in self.chunks:
            self.states.append(random_states())
            particles = self._trace(chunk, subsamples)
            if particles.log_w.isnan().any():
                raise_not_finite("A log weight", math.nan, particles)
            log_w.append(particles.log_w)
        return torch.cat(log_w), particles

    def differentiate(
        self, rule: GradientRule, linear: "LinearBound", retain_graph: bool | None
    ) -> None:
        """Run the second pass: add the gradients of a rule's negative objective to ``.grad``."""
        for chunk, particles in self._again(rule.leaves(linear)):
            if chunk.start > 0:  # terms equal for all particles count once
                particles = replace(particles, outer_terms=())
            surrogate = -rule.objective(linear.part(chunk), particles)
            if surrogate.requires_grad:
                surrogate.backward(retain_graph=retain_graph)
            del particles, surrogate

    def _again(self, leaves: Leaves) -> Iterator[tuple[slice, Particles]]:
        # A new handler, because the minibatch is drawn again as in the first pass.
        subsamples = SharedSubsamples()
        with kept_random_states():
            for chunk, state in zip(self.chunks, self.states, strict=True):
                set_random_states(state)
                # Keep no reference to a chunk while the next one runs.
                yield chunk, self._trace(chunk, subsamples, leaves)


class LinearBound(NamedTuple):
    """The linear function of K log weights with the derivatives of a bound at given weights.

    Because it is linear, it can be evaluated in parts, one chunk of particles at a time.

    :ivar first: the bound's first derivatives, of shape ``(K, *common)``.
    :ivar second: the bound's pure second derivatives, of shape ``(K, *common)``.
    :ivar signal: the bound's learning signal, of shape ``(K, *common)``; None if no site needs it.
    :ivar own_guide_bound: the linear bound that trains the guide; None if it is this one.
    """

    first: Float[Tensor, "K *common"]
    second: Float[Tensor, "K *common"]
    signal: Float[Tensor, "K *common"] | None
    own_guide_bound: "LinearBound | None"

    def part(self, particles: slice) -> "LinearBound":
        """Return the linear function of some of the particles."""
        own = self.own_guide_bound
        return LinearBound(
            self.first[particles],
            self.second[particles],
            None if self.signal is None else self.signal[particles],
            None if own is None else own.part(particles),
        )

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        """Return the linear function. Only its derivatives have a meaning."""
        # Weights of zero have zero coefficients: 0 x inf would be NaN.
        return (self.first * log_w.masked_fill(log_w.isinf(), 0.0)).sum(0)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the stored derivatives, for any log weights."""
        return self.first, self.second

    def learning_signal(self, log_w: Tensor) -> Any:
        """Return the stored learning signal, for any log weights."""
        return self.signal

    def model_weights(self, log_w: Tensor) -> Tensor:
        """Return the stored weights of the model's gradient, for any log weights."""
        return self.first

    @property
    def guide_bound(self) -> "LinearBound":
        """The bound that trains the guide."""
        return self if self.own_guide_bound is None else self.own_guide_bound

    @property
    def gradient_bound(self) -> "LinearBound":
        """This bound, which trains model and guide."""
        return self


def linearize(bound: Bound, log_w: Float[Tensor, "K *common"], has_score: bool) -> LinearBound:
    """Return the linear function with the derivatives of a bound at the given log weights.

    :param bound: the bound.
    :param log_w: the log weights of all particles.
    :param has_score: whether the guide has non-reparameterised sites.
    """
    bound = bound.gradient_bound
    guide_bound = bound.guide_bound
    first, second = bound.derivatives(log_w)
    return LinearBound(
        first if guide_bound is bound else bound.model_weights(log_w),
        second,
        signal=bound.learning_signal(log_w) if has_score else None,
        own_guide_bound=None if guide_bound is bound else linearize(guide_bound, log_w, has_score),
    )
