import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_ext.ops.differentiation import once_differentiable
from pyro_ext.ops.precision import accumulation_dtype

#: The largest number of subsets of one size that :func:`jackknife` will visit: C(2048, 2) fits.
MAX_SUBSETS = 2**21

# Subsets are visited in blocks of about this many numbers, which bounds the memory.
_BLOCK_NUMEL = 2**20


class TooManySubsetsError(ValueError):
    """Raised when a jackknife would have to visit more than :data:`MAX_SUBSETS` subsets."""


def jackknife_coefficients(num_particles: int, order: int) -> list[float]:
    r"""The weights of the leave-j-out means in the jackknife of order m.

    .. math:: c(K, m, j) = \frac{(-1)^j (K - j)^m}{(m - j)!\, j!}, \qquad j = 0, \dots, m

    They sum to one, and they are huge: order 2 at K = 256 has 32768 and -65025.

    Source: Nowozin (2018), Debiasing Evidence Approximations: On Importance-weighted
    Autoencoders and Jackknife Variational Inference.

    :param int num_particles: the number of particles K >= 1.
    :param int order: the order m, ``0 <= m < K``.
    :returns: the m + 1 coefficients, each correctly rounded.
    :raises ValueError: if ``order`` is outside ``0..K-1``.

    >>> jackknife_coefficients(10, 1)
    [10.0, -9.0]
    """
    if not 0 <= order < num_particles:
        raise ValueError(
            f"jackknife: expected 0 <= order < num_particles, "
            f"got order={order} with num_particles={num_particles}."
        )
    return [
        (-1) ** j * (num_particles - j) ** order / (math.factorial(order - j) * math.factorial(j))
        for j in range(order + 1)
    ]


def jackknife(log_w: Tensor, order: int = 1) -> Tensor:
    r"""The jackknife estimate of the log mean weight, over dim 0, with bias O(K^-(m+1)).

    .. math::

        \sum_{j=0}^{m} c(K, m, j)\, \bar L_{K-j}, \qquad
        \bar L_{K-j} = \binom{K}{j}^{-1} \sum_{|S| = j}
            \log \frac{1}{K - j} \sum_{i \notin S} e^{\ell_i}

    It is an estimate, not a bound. All the subsets are visited, in blocks, at a cost of
    O(K^m); the arithmetic is in float64 whatever the dtype of ``log_w``. Within a subset nothing
    cancels: with the weights sorted, a removed set takes a prefix and then others, each of them
    smaller than the largest weight that remains.

    Source: Nowozin (2018), Debiasing Evidence Approximations: On Importance-weighted
    Autoencoders and Jackknife Variational Inference.

    :param torch.Tensor log_w: log weights of shape ``(K, ...)``; entries may be ``-inf``.
    :param int order: the order m, ``0 <= m < K``; m = 0 is :func:`log_mean_exp`.
    :returns: a tensor of shape ``(...)`` and the dtype of ``log_w``. NaN where fewer than m + 1
        log weights are finite, for then a leave-m-out mean is the logarithm of zero. Its
        gradient with respect to ``log_w`` sums to one over dim 0; it can be taken once.
    :raises ValueError: if ``order`` is outside ``0..K-1``.
    :raises TooManySubsetsError: if C(K, j) exceeds :data:`MAX_SUBSETS` for a j <= m.

    >>> jackknife(torch.tensor([0.0, 1.0, 2.0]), order=1)
    tensor(1.4776)
    """
    _check(log_w, order)
    value, _ = _Jackknife.apply(log_w, order)
    return value


def jackknife_first_and_second(log_w: Tensor, order: int = 1) -> tuple[Tensor, Tensor]:
    r"""First and pure second derivatives of :func:`jackknife` in each log weight.

    With :math:`v_{k,S} = w_k / \sum_{i \notin S} w_i`,

    .. math::

        f_k = \sum_j c_j \tbinom{K}{j}^{-1} \sum_{S \not\ni k} v_{k,S}, \qquad
        f_{kk} = \sum_j c_j \tbinom{K}{j}^{-1} \sum_{S \not\ni k} v_{k,S} (1 - v_{k,S})

    Source: differentiating Nowozin (2018), equation of the generalised jackknife.

    :param torch.Tensor log_w: log weights of shape ``(K, ...)``.
    :param int order: the order m, ``0 <= m < K``.
    :returns: :math:`f_k` and :math:`f_{kk}`, each of the shape and dtype of ``log_w``.
    :raises ValueError: if ``order`` is outside ``0..K-1``.
    :raises TooManySubsetsError: if C(K, j) exceeds :data:`MAX_SUBSETS` for a j <= m.

    >>> first, second = jackknife_first_and_second(torch.zeros(4), order=1)
    >>> first
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    _check(log_w, order)
    _, first, squares = _evaluate(log_w.detach(), order)
    return first.to(log_w.dtype), (first - squares).to(log_w.dtype)


class _Jackknife(torch.autograd.Function):
    @staticmethod
    def forward(log_w: Tensor, order: int) -> tuple[Tensor, Tensor]:
        value, first, _ = _evaluate(log_w, order)
        return value.to(log_w.dtype), first.to(log_w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        _, first = output
        ctx.mark_non_differentiable(first)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], first)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if grad_value is None:
            return None, None
        log_w, first = ctx.saved_tensors
        message = (
            "jackknife can be differentiated once; for its pure second derivatives, "
            "use jackknife_first_and_second."
        )
        return grad_value * once_differentiable(first, log_w, message), None


def _check(log_w: Tensor, order: int) -> None:
    if log_w.dim() == 0 or not log_w.is_floating_point():
        raise ValueError(
            f"jackknife: expected floating log weights of shape (K, ...), "
            f"got {log_w.dtype} of shape {tuple(log_w.shape)}."
        )
    K = log_w.shape[0]
    jackknife_coefficients(K, order)
    num_subsets = max(math.comb(K, j) for j in range(order + 1))
    if num_subsets > MAX_SUBSETS:
        raise TooManySubsetsError(
            f"jackknife: order={order} over {K} particles has {num_subsets} subsets of one size, "
            f"more than MAX_SUBSETS = {MAX_SUBSETS}; expected a smaller order or fewer particles."
        )


def _evaluate(log_w: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """The value, f_k, and f_k - f_kk (the same sum over squared shares)."""
    K, batch_shape = log_w.shape[0], log_w.shape[1:]
    wide = log_w.reshape(K, batch_shape.numel()).to(accumulation_dtype(log_w.device))
    ranked, ranking = wide.sort(dim=0, descending=True)
    log_total = ranked.logsumexp(0)
    ranked = ranked - log_total

    # sum_j c_j = 1, so that only the differences of the leave-j-out means meet the coefficients.
    value = log_total - math.log(K)
    shares = ranked.new_zeros(2, *ranked.shape)
    for j, coefficient in enumerate(jackknife_coefficients(K, order)):
        difference, mean_shares = _leave_out(ranked, j)
        value = value + coefficient * difference
        shares = shares + coefficient * mean_shares
    value = torch.where(ranked[order].isneginf(), math.nan, value)
    shares = torch.zeros_like(shares).scatter(1, ranking.expand_as(shares), shares)
    first, squares = shares.view(2, *log_w.shape)
    return value.view(batch_shape), first, squares


def _leave_out(ranked: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """Means over all removed sets S of size j, for log weights sorted descending with sum 1.

    Returns mean_S log(mean of the rest) - log(mean of all), of shape (B,), and the means over S
    of v_iS and of v_iS^2, of shape (2, K, B), where v_iS is particle i's share of the rest, or 0
    if it was removed.

    The sets are grouped by the longest prefix 0..t-1 that they remove: particle t stays, the
    other j - t removed ones come after it, so that they are no larger than what remains.
    """
    K, B = ranked.shape
    log_rest = ranked.new_zeros(B)
    shares = ranked.new_zeros(2, K, B)
    for t in range(j + 1):
        r, n = j - t, K - t - 1
        if n < r:
            continue
        log_suffix = ranked[t:].logsumexp(0)
        share = (ranked[t:] - log_suffix).exp()
        later = share[1:]
        log_rest = log_rest + math.comb(n, r) * log_suffix
        # Sums over the sets of 1 / rest and of its square: of all sets, and of those with i in S.
        total = ranked.new_zeros(2, 1, B)
        lost = ranked.new_zeros(2, n, B)
        for subset in _subset_blocks(n, r, ranked):
            removed_share = later[subset].sum(0)
            log_rest = log_rest + torch.log1p(-removed_share).sum(0)
            inverse = (1 - removed_share).reciprocal()
            powers = torch.stack([inverse, inverse.square()])
            total = total + powers.sum(1, keepdim=True)
            lost = lost.index_add(1, subset.flatten(), powers.repeat(1, r, 1))
        kept = torch.cat([total, total - lost], dim=1)
        shares[:, t:] += torch.stack([share, share.square()]) * kept
    num_subsets = math.comb(K, j)
    return log_rest / num_subsets - math.log1p(-j / K), shares / num_subsets


def _subset_blocks(n: int, r: int, like: Tensor) -> Iterator[Tensor]:
    """The r-subsets of 0..n-1 as the columns of (r, block) index tensors."""
    subsets = torch.zeros(0, 1, dtype=torch.long, device=like.device)
    for size in range(1, r + 1):
        last = subsets[-1] if size > 1 else torch.full_like(subsets.sum(0), -1)
        count = n - 1 - last
        total = math.comb(n, size)
        rank = torch.arange(total, device=like.device) - (
            count.cumsum(0) - count
        ).repeat_interleave(count, output_size=total)
        parent = subsets.repeat_interleave(count, dim=1, output_size=total)
        new = last.repeat_interleave(count, output_size=total) + 1 + rank
        subsets = torch.cat([parent, new.unsqueeze(0)])
    block = max(1, _BLOCK_NUMEL // max(1, r * like.shape[1]))
    yield from subsets.split(block, dim=1)
