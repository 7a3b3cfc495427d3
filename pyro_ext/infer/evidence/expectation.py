import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ext.ops import MIN_DRAWS, LogMoments, WeightStatistics


@dataclass(frozen=True)
class Expectation:
    """An importance-sampling estimate of an expectation.

    Every tensor has the shape of the value that the model returns for one draw.

    :ivar value: the estimate.
    :ivar std_error: the standard error of ``value``; NaN for one draw.
    :ivar ess: the effective sample size of the weights. For a model without observations, it is
        computed from the products of the weights and the absolute values instead.
    :ivar pareto_k: the Pareto shape of the numbers from which ``ess`` is computed. If it is above
        0.7, do not trust the estimate.
    :ivar is_self_normalized: whether the weights were normalised by their sum.
    :ivar num_samples: the number of draws.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import estimate_expectation
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    ...     return z
    >>> pyro.set_rng_seed(0)
    >>> found = estimate_expectation(model)
    >>> found.is_self_normalized, bool((found.value - 0.5).abs() < 4 * found.std_error)
    (True, True)
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


class _Estimate:
    """The base class of both means, with the statistics of the numbers that carry the estimate."""

    is_self_normalized: bool

    def __init__(self, num_samples: int) -> None:
        self.statistics = WeightStatistics(num_samples)

    def _expectation(self, value: Tensor, std_error: Tensor) -> Expectation:
        S = self.statistics.num_samples
        pareto_k, ess = self.statistics.pareto_k, self.statistics.ess
        is_heavy = (pareto_k > 0.7) & (ess < 0.99 * S)
        if S >= MIN_DRAWS and bool(is_heavy.any()):
            warnings.warn(
                f"estimate_expectation: Pareto k is above 0.7 for {int(is_heavy.sum())} of "
                f"{is_heavy.numel()} values. A few draws dominate the estimate, and its standard "
                "error is too small. Use a guide with heavier tails.",
                stacklevel=4,
            )
        return Expectation(
            value=value,
            std_error=std_error if S > 1 else torch.full_like(std_error, math.nan),
            ess=ess,
            pareto_k=pareto_k,
            is_self_normalized=self.is_self_normalized,
            num_samples=S,
        )


class Mean(_Estimate):
    """The mean of w f, with its standard error."""

    is_self_normalized = False

    def __init__(self, num_samples: int, value: Tensor) -> None:
        super().__init__(num_samples)
        self.products = LogMoments()

    def update(self, log_w: Tensor, value: Tensor) -> None:
        """Add draws.

        :param log_w: log weights of shape ``(n,)``.
        :param value: values of shape ``(n, ...)``.
        """
        log_w, value = _broadcast(log_w, value)
        log_size = log_w + value.abs().log()
        self.products.update(log_size, value.sign())
        self.statistics.update(log_size)

    def result(self) -> Expectation:
        """Return the estimate."""
        is_zero = self.products.largest.isneginf()
        if bool(is_zero.any()):
            warnings.warn(
                f"estimate_expectation: each of {self.products.num_samples} draws gave zero for "
                f"{int(is_zero.sum())} of {is_zero.numel()} values, so their standard errors are "
                "not valid. Use a guide whose draws give values other than zero.",
                stacklevel=3,
            )
        scale = self.products.largest.exp()
        return self._expectation(self.products.mean * scale, self.products.std_error * scale)


class SelfNormalizedMean(_Estimate):
    """The mean of w f divided by the mean of w, with its standard error by the delta method."""

    is_self_normalized = True

    def __init__(self, num_samples: int, value: Tensor) -> None:
        super().__init__(num_samples)
        # The mean of the first values is subtracted, so that sums of squares do not cancel.
        self.shift = value.where(value.isfinite(), 0.0).mean(0)
        self.largest = torch.full_like(self.shift, -math.inf)
        self.first = value.new_zeros(2, *self.shift.shape)
        self.second = value.new_zeros(3, *self.shift.shape)

    def update(self, log_w: Tensor, value: Tensor) -> None:
        """Add draws.

        :param log_w: log weights of shape ``(n,)``.
        :param value: values of shape ``(n, ...)``.
        """
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
        """Return the estimate."""
        (w, wg), (ww, wwg, wwgg) = self.first, self.second
        if bool((w == 0).any()):
            raise ValueError(
                f"estimate_expectation: all {self.statistics.num_samples} weights are zero. The "
                "support of the guide misses the values that the data allow. Use a guide that "
                "draws them, such as a wider one."
            )
        mean = wg / w
        variance = (wwgg - 2 * mean * wwg + mean.square() * ww) / w.square()
        return self._expectation(self.shift + mean, variance.relu().sqrt())


def _broadcast(log_w: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return log weights and values of the same shape, with values of 0 where weights are 0."""
    log_w = log_w.reshape(-1, *(1,) * (value.dim() - 1)).expand_as(value)
    return log_w, value.masked_fill(log_w.isneginf(), 0.0)
