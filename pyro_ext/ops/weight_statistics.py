"""Statistics of importance weights that come in chunks."""

import math

import torch
from torch import Tensor

from pyro_ext.ops.jackknife import MAX_SUBSETS, jackknife
from pyro_ext.ops.log_mean_exp import log_mean_exp
from pyro_ext.ops.pareto import MIN_DRAWS, pareto_k_of_largest, tail_size
from pyro_ext.ops.precision import accumulation_dtype

#: The largest number of blocks whose means are kept for the jackknife.
MAX_BLOCKS = 1024


class WeightStatistics:
    r"""Mean, spread, tail and jackknife of importance weights, given in chunks.

    What is kept for each data point is a few sums, the :math:`3 \sqrt S` largest weights, and the
    means of at most :data:`MAX_BLOCKS` blocks of draws; hence memory that hardly grows with S.

    The jackknife is taken over the block means in place of the draws. They are independent weights
    with the same mean, so that it removes the same terms of the bias: with G blocks of b draws the
    r-th term is of order :math:`S^{-r}`, as for single draws, because the cumulants of a block's
    mean fall with b as those of the mean of all draws fall with S. What is left is
    :math:`O(S^{-(m + 1)})` for order m.

    Source: Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance.

    :param int num_samples: the number of draws S that is planned, which sizes tail and blocks.

    >>> statistics = WeightStatistics(num_samples=4)
    >>> for chunk in torch.tensor([[0.0, 0.0], [1.0, 3.0]]).double().log():
    ...     statistics.update(chunk)
    >>> statistics.log_mean.exp().item(), statistics.ess.item()
    (1.0, 1.6)
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = 0
        self._tail_size = tail_size(num_samples)
        self._block_size = -(-num_samples // MAX_BLOCKS)
        self._largest = self._mean = self._squares = torch.empty(0)
        self._tail = self._pending = torch.empty(0)
        self._blocks: list[Tensor] = []

    def update(self, log_w: Tensor) -> None:
        """Adds draws.

        :param torch.Tensor log_w: log weights of shape ``(n, ...)``.
        """
        log_w = log_w.to(accumulation_dtype(log_w.device))
        if self.num_samples == 0:
            self._largest = log_w.new_full(log_w.shape[1:], -math.inf)
            self._mean = self._squares = torch.zeros_like(self._largest)
            self._tail = self._pending = log_w[:0]
        self._update_moments(log_w)
        tail = torch.cat([self._tail, log_w])
        self._tail = tail.topk(min(self._tail_size + 1, len(tail)), dim=0, sorted=True).values
        pending = torch.cat([self._pending, log_w])
        num_blocks = len(pending) // self._block_size
        if num_blocks:
            whole = pending[: num_blocks * self._block_size].unflatten(0, (num_blocks, -1))
            self._blocks.append(log_mean_exp(whole, dim=1))
        self._pending = pending[num_blocks * self._block_size :].clone()

    def _update_moments(self, log_w: Tensor) -> None:
        n, before = len(log_w), self.num_samples
        largest = torch.maximum(self._largest, log_w.amax(0))
        reference = largest.masked_fill(largest.isneginf(), 0.0)
        rescale = (self._largest - reference).exp()
        w = (log_w - reference).exp()
        mean, old_mean = w.mean(0), self._mean * rescale
        difference = mean - old_mean
        squares = (w - mean).square().sum(0) + self._squares * rescale.square()
        self._squares = squares + difference.square() * (n * before / (n + before))
        self._mean = old_mean + difference * (n / (n + before))
        self._largest, self.num_samples = largest, before + n

    @property
    def log_mean(self) -> Tensor:
        """The log of the mean weight."""
        return self._largest + self._mean.log()

    @property
    def std_error(self) -> Tensor:
        """The standard error of :attr:`log_mean`, by the delta method; NaN for one draw."""
        S = self.num_samples
        error = self._squares.sqrt() / (S * self._mean)
        return error if S > 1 else torch.full_like(error, math.nan)

    @property
    def ess(self) -> Tensor:
        """The effective sample size."""
        S = self.num_samples
        return S / (1 + self._squares / (S * self._mean.square()))

    @property
    def pareto_k(self) -> Tensor:
        """The Pareto shape of the largest weights, as :func:`pareto_k` has it."""
        if self.num_samples < MIN_DRAWS:
            return torch.full_like(self._mean, math.inf)
        size = min(tail_size(self.num_samples), self._tail_size)
        return pareto_k_of_largest(self._tail[: size + 1].movedim(0, -1))

    def jackknife(self, order: int) -> Tensor:
        """The jackknife estimate of the log evidence, over blocks where draws are many.

        NaN where there are too few blocks, as after a stop before the number that was planned.

        :param int order: the order m, smaller than the number of draws.
        """
        num_blocks = sum(map(len, self._blocks))
        if num_blocks <= order:
            return torch.full_like(self._mean, math.nan)
        blocks = torch.cat(self._blocks)
        while num_blocks > order + 1 and math.comb(num_blocks, order) > MAX_SUBSETS:
            num_blocks -= 1
        merged = -(-len(blocks) // num_blocks)
        num_blocks = len(blocks) // merged
        means = log_mean_exp(
            blocks[: num_blocks * merged].unflatten(0, (num_blocks, merged)), dim=1
        )
        return self.log_mean + (jackknife(means, order) - log_mean_exp(means))
