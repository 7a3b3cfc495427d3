import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext.infer.handlers import PARTICLE_PLATE, is_masked_out
from pyro_ext.infer.not_finite import raise_not_finite
from pyro_ext.infer.particles import Particles
from pyro_ext.infer.streaming import ParticleStream
from pyro_ext.ops import WeightStatistics, accumulation_dtype


@dataclass(frozen=True)
class Expectation:
    """An importance-sampling estimate of an expectation. Tensors have the shape of the value.

    :ivar value: the estimate.
    :ivar std_error: its standard error.
    :ivar ess: the effective sample size: of the weighted values w |f| for a model without
        observations, of the weights w with them.
    :ivar pareto_k: the Pareto shape of the same; above 0.7 do not trust the estimate.
    :ivar is_self_normalized: whether the weights were normalised by their sum.
    :ivar num_samples: the number of draws.
    """

    value: Tensor
    std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    is_self_normalized: bool
    num_samples: int

    def __repr__(self) -> str:
        how = "self-normalised" if self.is_self_normalized else "unbiased"
        if self.value.dim():
            what = f"{how}, {self.num_samples} draws, shape {tuple(self.value.shape)}"
            return f"Expectation({what}, largest Pareto k {self.pareto_k.max():.2f})"
        return (
            f"Expectation({self.value:.6g} +- {self.std_error:.2g}, {how}, {self.num_samples} "
            f"draws, ess {self.ess:.1f}, Pareto k {self.pareto_k:.2f})"
        )


@torch.no_grad()
def estimate_expectation(
    model: Callable,
    guide: Callable | None = None,
    *args: Any,
    num_samples: int = 10_000,
    chunk_size: int | None = None,
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> Expectation:
    r"""Estimates the mean of what a model returns, by importance sampling from the guide.

    .. math::

        \hat\mu = \frac{1}{S} \sum_s w_s f(z_s) \quad \text{or} \quad
        \hat\mu = \frac{\sum_s w_s f(z_s)}{\sum_s w_s}, \qquad w_s = \frac{p(x, z_s)}{q(z_s)}

    The first where the model observes nothing, which is unbiased; the second, the mean under the
    posterior, where it has observed or factor sites. A guide that draws rare events often makes
    their probability, the mean of an indicator, cheap to estimate. Draws have one weight, that of
    all sites together, also under plates.

    Source: Owen (2013), Monte Carlo Theory, Methods and Examples, chapter 9.

    :param model: the model, a callable with Pyro primitives, which returns a real tensor.
    :param guide: the guide, likewise; None for the prior as proposal, which is plain Monte Carlo.
    :param args: positional arguments of both.
    :param int num_samples: the number of draws S >= 1.
    :param int chunk_size: how many particles run at once; at most 1,000 by default. 1 suits
        programs that cannot take the extra dim of vectorised particles.
    :param bool progress_bar: whether to show one.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: an :class:`Expectation`.
    :raises ValueError: if an argument is out of range, if the model returns no real tensor, if
        values or weights are NaN, if all weights are zero, and where :class:`MultiSampleELBO`
        raises it.

    It warns where all values were zero, for then nothing was seen of what is rare.

    P(z > 5) of a standard normal, by draws around 5:

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     return (pyro.sample("z", dist.Normal(0.0, 1.0)) > 5).float()
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(5.0, 1.0))
    >>> pyro.set_rng_seed(0)
    >>> found = estimate_expectation(model, guide)
    >>> bool((found.value - 2.8665e-7).abs() < 4 * found.std_error)
    True
    """
    stream = ParticleStream(
        "estimate_expectation",
        model,
        guide,
        num_samples,
        chunk_size,
        1000,
        max_plate_nesting,
        progress_bar,
    )
    sums = _Sums(num_samples)
    for particles, num_used, _ in stream.draw(args, kwargs):
        sums.is_self_normalized = _has_observations(particles)
        log_w, value = _weights_and_values(particles)
        sums.update(log_w[:num_used], value[:num_used])
    return sums.result()


def _weights_and_values(particles: Particles) -> tuple[Tensor, Tensor]:
    """One log weight for each particle, and the values that the model returned, in float64."""
    wide = accumulation_dtype(particles.log_w.device)
    log_w = particles.log_w.to(wide).reshape(len(particles.log_w), -1).sum(1)
    if log_w.isnan().any():
        raise_not_finite("estimate_expectation: a log weight", math.nan, particles)
    returned: list[Any] = [trace.nodes["_RETURN"]["value"] for trace in particles.model_traces]
    for value in returned:
        if not isinstance(value, Tensor) or value.is_complex():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"estimate_expectation: expected the model to return a real tensor, got {found}."
            )
    if len(returned) > 1:
        value = torch.stack(torch.broadcast_tensors(*returned))
    else:
        (value,) = returned
        fillers = _num_fillers(particles)
        if value.dim() == 0 or value.shape[0] != len(log_w):  # it does not depend on a draw
            value = value.expand(len(log_w), *value.shape)
        for dim in range(min(fillers, value.dim() - 1), 0, -1):
            value = value.squeeze(dim)
    value = value.to(wide)
    if value.isnan().any():
        raise ValueError("estimate_expectation: expected numbers from the model, got NaN.")
    return log_w, value


def _num_fillers(particles: Particles) -> int:
    """The number of dims between that of the particles and the right end of a batch shape."""
    site: Any
    for trace in (*particles.guide_traces, *particles.model_traces):
        for _, site in trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                if frame.name == PARTICLE_PLATE:
                    return -frame.dim - 1
    return 0


def _has_observations(particles: Particles) -> bool:
    nodes: Any = particles.model_traces[0].nodes.values()
    return any(
        node["type"] == "sample" and node["is_observed"] and not is_masked_out(node)
        for node in nodes
    )


class _Sums:
    """Running sums of weights and weighted values, relative to the largest weight."""

    def __init__(self, num_samples: int) -> None:
        self.is_self_normalized = False
        self.statistics = WeightStatistics(num_samples)
        self.largest = self.first = self.second = torch.empty(0)

    def update(self, log_w: Tensor, value: Tensor) -> None:
        """Adds log weights of shape ``(n,)`` and values of shape ``(n, ...)``."""
        if self.statistics.num_samples == 0:
            self.largest = log_w.new_full((), -math.inf)
            self.first = value.new_zeros(2, *value.shape[1:])
            self.second = value.new_zeros(3, *value.shape[1:])
        largest = torch.maximum(log_w.amax(), self.largest)
        reference = largest.masked_fill(largest.isneginf(), 0.0)
        rescale = (self.largest - reference).exp()
        w = (log_w - reference).exp().reshape(-1, *(1,) * (value.dim() - 1)).expand_as(value)
        # Where the weight is zero, so is the product, whatever the value.
        wf = (w * value).masked_fill(w == 0, 0.0)
        self.first = self.first * rescale + torch.stack([w.sum(0), wf.sum(0)])
        squares = torch.stack([w.square().sum(0), (w * wf).sum(0), wf.square().sum(0)])
        self.second = self.second * rescale.square() + squares
        self.largest = largest
        self.statistics.update((w if self.is_self_normalized else wf.abs()).log() + reference)

    def result(self) -> Expectation:
        """The estimate."""
        S = self.statistics.num_samples
        (w, wf), (ww, wwf, wwff) = self.first, self.second
        if self.is_self_normalized:
            if bool((w == 0).any()):
                raise ValueError(
                    f"estimate_expectation: expected draws with weights above zero, and all {S} "
                    "weights are zero: the guide's support misses what the data allow."
                )
            value = wf / w
            variance = (wwff - 2 * value * wwf + value.square() * ww) / w.square()
        else:
            scale = self.largest.exp()
            mean = wf / S
            value = mean * scale
            variance = (wwff / S - mean.square()) / S * scale.square()
            if bool((wwff == 0).any()):
                warnings.warn(
                    f"estimate_expectation: each of {S} draws gave zero, which tells nothing of "
                    "the error: use a guide that draws what the model returns a value for.",
                    stacklevel=3,
                )
        error = variance.relu().sqrt()
        return Expectation(
            value=value,
            std_error=error if S > 1 else torch.full_like(error, math.nan),
            ess=self.statistics.ess,
            pareto_k=self.statistics.pareto_k,
            is_self_normalized=self.is_self_normalized,
            num_samples=S,
        )
