import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.data_blocks import DataBlock
from pyro_ext.infer.handlers import PARTICLE_PLATE, is_masked_out
from pyro_ext.infer.particles import Particles
from pyro_ext.infer.streaming import ParticleStream
from pyro_ext.ops import MIN_DRAWS, LogMoments, WeightStatistics, accumulation_dtype
from pyro_ext.ops.random_state import get_random_state, set_random_state

NAME = "estimate_expectation"


@dataclass(frozen=True)
class Expectation:
    """An importance-sampling estimate of an expectation. Tensors have the shape of the value.

    :ivar value: the estimate.
    :ivar std_error: its standard error.
    :ivar ess: the effective sample size: of the weights times the sizes of the values for a model
        without observations, of the weights with them.
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
    all sites together, also under plates. The first dim of what the model returns is that of the
    particles, unless they run one by one: reduce over dims counted from the right.

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
    :raises ValueError: if an argument is out of range, if the model returns no real tensor or one
        without the dim of the particles, if values or weights are NaN, if all weights are zero,
        and where :class:`MultiSampleELBO` raises it.

    It warns where all values were zero, for then nothing was seen of what is rare, and where a
    Pareto k is above 0.7.

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
    stream = ParticleStream(NAME, model, guide, num_samples, chunk_size, 1000, max_plate_nesting)
    block = DataBlock(args, kwargs)
    if stream.is_vectorized:
        _check_particle_dim(stream, DataBlock(args, kwargs))
    estimate: _Mean | _SelfNormalizedMean | None = None
    with tqdm(total=num_samples, desc=NAME, unit="draw", disable=not progress_bar) as bar:
        for particles, num_used in stream.draw(block, bar=bar):
            log_w, value = _weights_and_values(particles)
            has_observations = _has_observations(particles)
            del particles
            if estimate is None:
                kind = _SelfNormalizedMean if has_observations else _Mean
                estimate = kind(num_samples, value)
            estimate.update(log_w[:num_used], value[:num_used])
    assert estimate is not None  # there is at least one chunk
    return estimate.result()


def _check_particle_dim(stream: ParticleStream, block: DataBlock) -> None:
    """Raises unless the first dim of what the model returns is that of the particles."""
    state = get_random_state()
    shapes = [_returned(stream.run(block, size))[0].shape for size in (2, 3)]
    set_random_state(state)
    if [shape[:1] for shape in shapes] != [(2,), (3,)] or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"{NAME}: expected the model to return a tensor whose first dim is that "
            f"of the particles, got shapes {tuple(shapes[0])} for 2 and {tuple(shapes[1])} for 3 "
            "of them. Reduce over dims counted from the right, such as .sum(-1), not over all; "
            "or pass chunk_size=1."
        )


def _returned(particles: Particles) -> list[Tensor]:
    """What the model returned, once if vectorised, else once for each particle."""
    returned: list[Any] = [trace.nodes["_RETURN"]["value"] for trace in particles.model_traces]
    for value in returned:
        if not isinstance(value, Tensor) or value.is_complex():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{NAME}: expected the model to return a real tensor, got {found}.")
    return returned


def _weights_and_values(particles: Particles) -> tuple[Tensor, Tensor]:
    """One log weight for each particle, and the values that the model returned, in float64."""
    wide = accumulation_dtype(particles.log_w.device)
    log_w = particles.log_w.to(wide).reshape(len(particles.log_w), -1).sum(1)
    returned = _returned(particles)
    if len(returned) > 1:
        value = torch.stack(torch.broadcast_tensors(*returned))
    else:
        (value,) = returned
        for position in _filler_positions(particles, value.dim()):
            value = value.squeeze(position)
    value = value.to(wide)
    has_weight = ~log_w.isneginf().reshape(-1, *(1,) * (value.dim() - 1))
    if (has_weight & ~value.isfinite()).any():
        raise ValueError(
            f"{NAME}: expected finite numbers from the model, got NaN or infinity "
            "where the weight is not zero."
        )
    return log_w, value


def _filler_positions(particles: Particles, num_dims: int) -> list[int]:
    """The dims between that of the particles and the batch's end that no plate has, descending."""
    site: Any
    dims: dict[str, int] = {}
    for trace in (*particles.guide_traces, *particles.model_traces):
        for _, site in trace.iter_stochastic_nodes():
            dims |= {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    particle_dim = dims.get(PARTICLE_PLATE, -1)
    fillers = [dim - particle_dim for dim in range(particle_dim + 1, 0) if dim not in dims.values()]
    return sorted((position for position in fillers if position < num_dims), reverse=True)


def _has_observations(particles: Particles) -> bool:
    nodes: Any = particles.model_traces[0].nodes.values()
    return any(
        node["type"] == "sample" and node["is_observed"] and not is_masked_out(node)
        for node in nodes
    )


class _Estimate:
    """What both kinds of mean keep: the statistics of what carries the estimate."""

    is_self_normalized: bool

    def __init__(self, num_samples: int) -> None:
        self.statistics = WeightStatistics(num_samples)

    def _expectation(self, value: Tensor, std_error: Tensor) -> Expectation:
        S = self.statistics.num_samples
        pareto_k, ess = self.statistics.pareto_k, self.statistics.ess
        is_heavy = (pareto_k > 0.7) & (ess < 0.99 * S)
        if S >= MIN_DRAWS and bool(is_heavy.any()):
            warnings.warn(
                f"{NAME}: Pareto k is above 0.7 for {int(is_heavy.sum())} of "
                f"{is_heavy.numel()} values: a few draws carry the estimate, and its standard "
                "error is too small. Use a guide with heavier tails.",
                stacklevel=5,
            )
        return Expectation(
            value=value,
            std_error=std_error if S > 1 else torch.full_like(std_error, math.nan),
            ess=ess,
            pareto_k=pareto_k,
            is_self_normalized=self.is_self_normalized,
            num_samples=S,
        )


class _Mean(_Estimate):
    """The mean of w f, and its standard error."""

    is_self_normalized = False

    def __init__(self, num_samples: int, value: Tensor) -> None:
        super().__init__(num_samples)
        self.products = LogMoments()

    def update(self, log_w: Tensor, value: Tensor) -> None:
        """Adds log weights of shape ``(n,)`` and values of shape ``(n, ...)``."""
        log_w, value = _broadcast(log_w, value)
        log_size = log_w + value.abs().log()
        self.products.update(log_size, value.sign())
        self.statistics.update(log_size)

    def result(self) -> Expectation:
        """The estimate."""
        is_zero = self.products.largest.isneginf()
        if bool(is_zero.any()):
            warnings.warn(
                f"{NAME}: each of {self.products.num_samples} draws gave zero, which "
                "tells nothing of the error: use a guide that draws what the model returns a value "
                f"for ({int(is_zero.sum())} of {is_zero.numel()} values).",
                stacklevel=4,
            )
        scale = self.products.largest.exp()
        return self._expectation(self.products.mean * scale, self.products.std_error * scale)


class _SelfNormalizedMean(_Estimate):
    """The mean of w f over that of w, and its standard error by the delta method."""

    is_self_normalized = True

    def __init__(self, num_samples: int, value: Tensor) -> None:
        super().__init__(num_samples)
        # Values are taken relative to some mean, for their squares not to cancel.
        self.shift = value.where(value.isfinite(), 0.0).mean(0)
        self.largest = torch.full_like(self.shift, -math.inf)
        self.first = value.new_zeros(2, *self.shift.shape)
        self.second = value.new_zeros(3, *self.shift.shape)

    def update(self, log_w: Tensor, value: Tensor) -> None:
        """Adds log weights of shape ``(n,)`` and values of shape ``(n, ...)``."""
        log_w, value = _broadcast(log_w, value)
        self.statistics.update(log_w)
        largest = torch.maximum(log_w.amax(0), self.largest)
        reference = largest.masked_fill(largest.isneginf(), 0.0)
        rescale = (self.largest - reference).exp()
        w = (log_w - reference).exp()
        wg = w * (value - self.shift)
        self.first = self.first * rescale + torch.stack([w.sum(0), wg.sum(0)])
        squares = torch.stack([w.square().sum(0), (w * wg).sum(0), wg.square().sum(0)])
        self.second = self.second * rescale.square() + squares
        self.largest = largest

    def result(self) -> Expectation:
        """The estimate."""
        (w, wg), (ww, wwg, wwgg) = self.first, self.second
        if bool((w == 0).any()):
            raise ValueError(
                f"{NAME}: expected draws with weights above zero, and all "
                f"{self.statistics.num_samples} weights are zero: the guide's support misses what "
                "the data allow."
            )
        mean = wg / w
        variance = (wwgg - 2 * mean * wwg + mean.square() * ww) / w.square()
        return self._expectation(self.shift + mean, variance.relu().sqrt())


def _broadcast(log_w: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights and values of the same shape; values are zero where weights are."""
    log_w = log_w.reshape(-1, *(1,) * (value.dim() - 1)).expand_as(value)
    return log_w, value.masked_fill(log_w.isneginf(), 0.0)
