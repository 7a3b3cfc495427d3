"""Statistics of importance weights that arrive in chunks."""

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext.ops.jackknife import MAX_SUBSETS, jackknife
from pyro_ext.ops.log_mean_exp import log_mean_exp
from pyro_ext.ops.pareto import MIN_DRAWS, pareto_k_of_largest, tail_size
from pyro_ext.ops.precision import accumulation_dtype

#: The largest number of blocks whose means are kept for the jackknife. It is even, because blocks
#: are merged in pairs.
MAX_BLOCKS = 1024
#: At least this many of the largest weights are kept, in case more draws follow than planned.
MIN_TAIL = 256


class LogMoments:
    """The running mean and spread of numbers that are given by the logs of their absolute values.

    :ivar largest: the largest log absolute value so far. The moments are relative to it.
    :ivar mean: the mean, divided by ``largest.exp()``.
    :ivar squares: the sum of squared deviations from the mean, divided by ``largest.exp()``
        squared.
    :ivar num_samples: the count of numbers so far.

    Source: Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance.

    >>> moments = LogMoments()
    >>> moments.update(torch.tensor([1.0, 3.0]).log(), torch.tensor([-1.0, 1.0]))
    >>> (moments.mean * moments.largest.exp()).item()
    1.0
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self.largest = self.mean = self.squares = torch.empty(0)

    def update(
        self, log_size: Float[Tensor, "n *rest"], sign: Float[Tensor, "n *rest"] | float = 1.0
    ) -> None:
        """Add numbers.

        :param log_size: the logs of the absolute values, of shape ``(n, ...)``.
        :param sign: the signs, -1 or 1, of the same shape, or one sign for all numbers.
        """
        if self.num_samples == 0:
            self.largest = log_size.new_full(log_size.shape[1:], -math.inf)
            self.mean = self.squares = torch.zeros_like(self.largest)
        n, before = len(log_size), self.num_samples
        largest = torch.maximum(self.largest, log_size.amax(0))
        reference = largest.masked_fill(largest.isneginf(), 0.0)
        rescale = (self.largest - reference).exp()
        x = sign * (log_size - reference).exp()
        mean, old_mean = x.mean(0), self.mean * rescale
        difference = mean - old_mean
        squares = (x - mean).square().sum(0) + self.squares * rescale.square()
        self.squares = squares + difference.square() * (n * before / (n + before))
        self.mean = old_mean + difference * (n / (n + before))
        self.largest, self.num_samples = largest, before + n

    @property
    def std_error(self) -> Tensor:
        """The standard error of ``mean``."""
        return self.squares.sqrt() / self.num_samples


class WeightStatistics:
    r"""The mean, spread, tail and jackknife of importance weights that arrive in chunks.

    Three things are kept for each data point: a few sums, the :math:`3 \sqrt S` largest weights (at
    least 256), and the means of at most 1,024 blocks of draws. Memory therefore hardly grows with
    S. At first, a block is one draw. Whenever there would be more than 1,024 blocks, the block size
    doubles.

    The jackknife uses the block means instead of the draws. The block means are independent weights
    with the same mean, so the jackknife removes the same terms of the bias. With G blocks of b
    draws, the r-th term is of order :math:`S^{-r}`, as for single draws. The reason is that the
    cumulants of a block mean fall with b in the same way in which the cumulants of the mean of all
    draws fall with S. The remaining bias is :math:`O(S^{-(m + 1)})` for order m.

    An update replaces the tensors and lists of an instance, and changes none in place. A shallow
    copy can therefore be updated independently.

    :param num_samples: the planned number of draws S, which determines the size of the tail.

    >>> statistics = WeightStatistics(num_samples=4)
    >>> for chunk in torch.tensor([[0.0, 0.0], [1.0, 3.0]]).double().log():
    ...     statistics.update(chunk)
    >>> statistics.log_mean.exp().item(), statistics.ess.item()
    (1.0, 1.6)
    """

    def __init__(self, num_samples: int) -> None:
        self._moments = LogMoments()
        self._tail_size = 0
        self.plan(num_samples)
        self._block_size = 1
        self._tail: list[Tensor] = []
        self._pending = torch.empty(0)
        self._blocks: list[Tensor] = []

    def plan(self, num_samples: int) -> None:
        """Keep enough of the largest weights, from now on, for a new planned number of draws.

        :param num_samples: the planned number of draws.
        """
        self._tail_size = max(self._tail_size, MIN_TAIL, tail_size(num_samples))

    def update(self, log_w: Float[Tensor, "n *rest"]) -> None:
        """Add draws.

        :param log_w: log weights of shape ``(n, ...)``.
        """
        log_w = log_w.to(accumulation_dtype(log_w.device))
        if self.num_samples == 0:
            self._pending = log_w[:0]
        self._moments = copy.copy(self._moments)
        self._moments.update(log_w)
        self._tail = [*self._tail, log_w]
        if sum(map(len, self._tail)) > 2 * self._tail_size:
            self._tail = [self._largest(self._tail_size + 1)]
        self._pending = torch.cat([self._pending, log_w])
        while len(self._pending) >= self._block_size:
            self._fill_blocks()
        self._pending = self._pending.clone()

    def _fill_blocks(self) -> None:
        room = MAX_BLOCKS - sum(map(len, self._blocks))
        if room == 0:
            pairs = torch.cat(self._blocks).unflatten(0, (MAX_BLOCKS // 2, 2))
            self._blocks = [log_mean_exp(pairs, dim=1)]
            self._block_size *= 2
            return
        number = min(room, len(self._pending) // self._block_size)
        whole, self._pending = self._pending.tensor_split([number * self._block_size])
        if self._block_size > 1:
            whole = log_mean_exp(whole.unflatten(0, (number, -1)), dim=1)
        self._blocks = [*self._blocks, whole]

    def _largest(self, number: int) -> Tensor:
        """Return the largest weights, in descending order."""
        tail = torch.cat(self._tail)
        return tail.topk(min(number, len(tail)), dim=0, sorted=True).values

    @property
    def num_samples(self) -> int:
        """The number of draws so far."""
        return self._moments.num_samples

    @property
    def log_mean(self) -> Tensor:
        """The log of the mean weight."""
        return self._moments.largest + self._moments.mean.log()

    @property
    def std_error(self) -> Tensor:
        """The standard error of :attr:`log_mean`, by the delta method; NaN for one draw."""
        error = self._moments.std_error / self._moments.mean
        return error if self.num_samples > 1 else torch.full_like(error, math.nan)

    @property
    def ess(self) -> Tensor:
        """The effective sample size."""
        S = self.num_samples
        return S / (1 + self._moments.squares / (S * self._moments.mean.square()))

    @property
    def pareto_k(self) -> Tensor:
        """The Pareto shape of the largest weights, as in :func:`pareto_k`."""
        if self.num_samples < MIN_DRAWS:
            return torch.full_like(self._moments.mean, math.inf)
        size = min(tail_size(self.num_samples), self._tail_size)
        return pareto_k_of_largest(self._largest(size + 1).movedim(0, -1))

    def jackknife(self, order: int) -> Tensor:
        """Return the jackknife estimate of the log evidence, over blocks if there are many draws.

        :param order: the order m >= 0, smaller than the number of draws.
        :returns: the estimate; NaN if there are too few draws.
        """
        num_blocks = sum(map(len, self._blocks))
        if num_blocks <= order:
            return torch.full_like(self._moments.mean, math.nan)
        blocks = torch.cat(self._blocks)
        while num_blocks > order + 1 and math.comb(num_blocks, order) > MAX_SUBSETS:
            num_blocks -= 1
        merged = -(-len(blocks) // num_blocks)
        num_blocks = len(blocks) // merged
        if num_blocks <= order:
            return torch.full_like(self._moments.mean, math.nan)
        kept = blocks[: num_blocks * merged].unflatten(0, (num_blocks, merged))
        means = log_mean_exp(kept, dim=1)
        return self.log_mean + (jackknife(means, order) - log_mean_exp(means))
