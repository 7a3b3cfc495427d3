import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext.ops.once_differentiable import zero_with_derivative
from pyro_ext.ops.precision import accumulation_dtype

#: The largest number of subsets of one size that :func:`jackknife` visits. C(2048, 2) is below it.
MAX_SUBSETS = 2**21

# Subsets are visited in blocks of about this many numbers, to bound the memory.
_BLOCK_NUMEL = 2**20
_PAIR_BLOCK_NUMEL = 2**17  # several passes over a block stay in the cache


class TooManySubsetsError(ValueError):
    """The error for a jackknife with more than :data:`MAX_SUBSETS` subsets of one size."""


def jackknife_coefficients(num_particles: int, order: int) -> list[float]:
    r"""Return the weights of the leave-j-out means in the jackknife of order m.

    .. math:: c(K, m, j) = \frac{(-1)^j (K - j)^m}{(m - j)!\, j!}, \qquad j = 0, \dots, m

    They sum to one, and they can be huge: for order 2 and K = 256, two of them are 32768 and
    -65025.

    :param num_particles: the number of particles K >= 1.
    :param order: the order m, ``0 <= m < K``.
    :returns: a list of the m + 1 coefficients, each correctly rounded.
    :raises ValueError: if ``order`` is outside ``0..K-1``.

    Source: Nowozin (2018), Debiasing Evidence Approximations: On Importance-weighted Autoencoders
    and Jackknife Variational Inference.

    >>> jackknife_coefficients(10, 1)
    [10.0, -9.0]
    """
    if not 0 <= order < num_particles:
        raise ValueError(
            f"jackknife: order must be at least 0 and less than num_particles={num_particles}, "
            f"but it is {order}."
        )
    return [
        (-1) ** j * (num_particles - j) ** order / (math.factorial(order - j) * math.factorial(j))
        for j in range(order + 1)
    ]


def jackknife(log_w: Tensor, order: int = 1) -> Tensor:
    r"""Return the jackknife estimate of the log mean weight over dim 0, with bias O(K^-(m+1)).

    .. math::

        \sum_{j=0}^{m} c(K, m, j)\, \bar L_{K-j}, \qquad
        \bar L_{K-j} = \binom{K}{j}^{-1} \sum_{|S| = j}
            \log \frac{1}{K - j} \sum_{i \notin S} e^{\ell_i}

    It is an estimate, not a bound. All subsets are visited, in blocks, at a cost of O(K^m). The
    arithmetic is in float64 for every dtype of ``log_w``. Within a subset, no digits cancel: the
    weights are sorted, and a removed set consists of a prefix and of further weights. Each further
    weight is smaller than the largest weight that remains.

    :param log_w: log weights of shape ``(K, ...)``. Entries may be ``-inf``.
    :param order: the order m, ``0 <= m < K``. Order 0 is :func:`log_mean_exp`.
    :returns: a tensor of shape ``(...)`` in the dtype of ``log_w``. It is NaN where fewer than
        m + 1 log weights are finite, because a leave-m-out mean is then the logarithm of zero. It
        can be differentiated once, and its gradient in ``log_w`` sums to one over dim 0.
    :raises ValueError: if ``order`` is outside ``0..K-1``.
    :raises TooManySubsetsError: if C(K, j) exceeds :data:`MAX_SUBSETS` for a j <= m.

    Source: Nowozin (2018), Debiasing Evidence Approximations: On Importance-weighted Autoencoders
    and Jackknife Variational Inference.

    >>> jackknife(torch.tensor([0.0, 1.0, 2.0]), order=1)
    tensor(1.4776)
    """
    _check(log_w, order)
    value, (first,) = _evaluate(log_w.detach(), order, num_powers=1)
    message = (
        "jackknife can only be differentiated once. For its pure second derivatives, use "
        "jackknife_derivatives."
    )
    zero = zero_with_derivative(first.to(log_w.dtype), log_w, message)
    return value.to(log_w.dtype) + zero.sum(0)


def jackknife_derivatives(
    log_w: Tensor, order: int = 1
) -> tuple[Float[Tensor, "K *rest"], Float[Tensor, "K *rest"]]:
    r"""Return the first and pure second derivatives of :func:`jackknife` in each log weight.

    With :math:`v_{k,S} = w_k / \sum_{i \notin S} w_i`,

    .. math::

        f_k = \sum_j c_j \tbinom{K}{j}^{-1} \sum_{S \not\ni k} v_{k,S}, \qquad
        f_{kk} = \sum_j c_j \tbinom{K}{j}^{-1} \sum_{S \not\ni k} v_{k,S} (1 - v_{k,S})

    :param log_w: log weights of shape ``(K, ...)``.
    :param order: the order m, ``0 <= m < K``.
    :returns: :math:`f_k` and :math:`f_{kk}`, each with the shape and dtype of ``log_w``.
    :raises ValueError: if ``order`` is outside ``0..K-1``.
    :raises TooManySubsetsError: if C(K, j) exceeds :data:`MAX_SUBSETS` for a j <= m.

    Source: the derivatives of the generalised jackknife in Nowozin (2018), Debiasing Evidence
    Approximations: On Importance-weighted Autoencoders and Jackknife Variational Inference.

    >>> first, second = jackknife_derivatives(torch.zeros(4), order=1)
    >>> first
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    _check(log_w, order)
    _, (first, squares) = _evaluate(log_w.detach(), order, num_powers=2)
    return first.to(log_w.dtype), (first - squares).to(log_w.dtype)


def _check(log_w: Tensor, order: int) -> None:
    if log_w.dim() == 0 or not log_w.is_floating_point():
        raise ValueError(
            "jackknife: log_w must be a floating-point tensor of shape (K, ...), but it has dtype "
            f"{log_w.dtype} and shape {tuple(log_w.shape)}."
        )
    K = log_w.shape[0]
    jackknife_coefficients(K, order)
    num_subsets = max(math.comb(K, j) for j in range(order + 1))
    if num_subsets > MAX_SUBSETS:
        raise TooManySubsetsError(
            f"jackknife: order={order} with {K} particles has {num_subsets} subsets of one size. "
            f"The limit is MAX_SUBSETS = {MAX_SUBSETS}. Use a smaller order or fewer particles."
        )


def _evaluate(
    log_w: Float[Tensor, "K *rest"], order: int, num_powers: int
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "powers K *rest"]]:
    """Return the estimate, and the weighted sums of each particle's shares and of their powers.

    The first power gives f_k. The second power, if there is one, gives f_k - f_kk.
    """
    K, batch_shape = log_w.shape[0], log_w.shape[1:]
    wide = log_w.reshape(K, batch_shape.numel()).to(accumulation_dtype(log_w.device))
    ranked, ranking = wide.sort(dim=0, descending=True)
    log_total = ranked.logsumexp(0)
    ranked = ranked - log_total

    # The large coefficients sum to one, so they need to multiply only differences of the means.
    value = log_total - math.log(K)
    shares = ranked.new_zeros(num_powers, *ranked.shape)
    suffixes = [_suffix(ranked, t) for t in range(order + 1)]
    for j, coefficient in enumerate(jackknife_coefficients(K, order)):
        difference, mean_shares = _leave_out(suffixes, j, num_powers)
        value = value + coefficient * difference
        shares = shares + coefficient * mean_shares
    value = torch.where(ranked[order].isneginf(), math.nan, value)
    shares = torch.zeros_like(shares).scatter(1, ranking.expand_as(shares), shares)
    return value.view(batch_shape), shares.view(num_powers, *log_w.shape)


def _suffix(
    ranked: Float[Tensor, "K n"], t: int
) -> tuple[Float[Tensor, "n"], Float[Tensor, "rest n"]]:
    """Return the log of the sum from the t-th weight on, and the share of each weight in it."""
    log_suffix = ranked[t:].logsumexp(0)
    return log_suffix, (ranked[t:] - log_suffix).exp()


def _leave_out(
    suffixes: Sequence[tuple[Tensor, Tensor]], j: int, num_powers: int
) -> tuple[Tensor, Tensor]:
    """Return means over all removed sets S of size j.

    The log weights are sorted in descending order, and the weights sum to 1. The first result is
    the mean over S of log(mean of the rest) - log(mean of all), of shape (B,). The second is the
    mean over S of v_iS, v_iS^2, ..., of shape (num_powers, K, B). Here v_iS is particle i's share
    of the rest, or 0 if it was removed.

    The sets are grouped by the longest prefix 0..t-1 that they remove. Particle t stays, and the
    other j - t removed particles come after it. Each of their weights is therefore no larger than
    the sum that remains.
    """
    K, B = suffixes[0][1].shape
    log_rest = suffixes[0][1].new_zeros(B)
    shares = suffixes[0][1].new_zeros(num_powers, K, B)
    for t in range(j + 1):
        r, n = j - t, K - t - 1
        if n < r:
            continue
        log_suffix, share = suffixes[t]
        log_remaining, total, lost = _sums_over_subsets(share[1:], r, num_powers)
        log_rest = log_rest + math.comb(n, r) * log_suffix + log_remaining
        kept = torch.cat([total, total - lost], dim=1)
        shares[:, t:] += _powers(share, num_powers) * kept
    num_subsets = math.comb(K, j)
    return log_rest / num_subsets - math.log1p(-j / K), shares / num_subsets


def _sums_over_subsets(share: Tensor, r: int, num_powers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over the r-subsets S of n particles, where rest_S is 1 minus the shares in S.

    The first result is the sum of log rest_S, of shape (B,). The second is the sum of 1 / rest_S
    and its powers, of shape (num_powers, 1, B). The third has the same sums over only the subsets
    that contain each particle, of shape (num_powers, n, B).
    """
    n, B = share.shape
    log_rest, lost = share.new_zeros(B), share.new_zeros(num_powers, n, B)
    if r == 0:
        return log_rest, share.new_ones(num_powers, 1, B), lost
    if r == 1:
        lost = _powers((1 - share).reciprocal(), num_powers)
        return torch.log1p(-share).sum(0), lost.sum(1, keepdim=True), lost
    if r == 2:
        return _sums_over_pairs(share, num_powers)
    total = share.new_zeros(num_powers, 1, B)
    for subset in _subset_blocks(n, r, share):
        removed = share[subset].sum(0)
        log_rest = log_rest + torch.log1p(-removed).sum(0)
        powers = _powers((1 - removed).reciprocal(), num_powers)
        total = total + powers.sum(1, keepdim=True)
        lost = lost.index_add(1, subset.flatten(), powers.repeat(1, r, 1))
    return log_rest, total, lost


def _sums_over_pairs(share: Tensor, num_powers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of :func:`_sums_over_subsets` for pairs.

    The pairs are visited in blocks of the triangle above the diagonal.
    """
    n, B = share.shape
    log_rest, in_pairs = share.new_zeros(B), share.new_zeros(num_powers, n, B)
    size = max(1, _PAIR_BLOCK_NUMEL // max(1, n * B))
    for start in range(0, n, size):
        rows, columns = share[start : start + size], share[start:]
        negative = (rows.unsqueeze(1) + columns).neg_()
        # Entries on or below the diagonal are not pairs: their log becomes 0, and their inverse 1.
        no_pairs = torch.ones(len(rows), len(columns), device=share.device).tril_().bool()
        negative.masked_fill_(no_pairs.unsqueeze(-1), 0.0)
        log_rest += torch.log1p(negative).sum((0, 1))
        powers = _powers(negative.add_(1).reciprocal_(), num_powers)
        in_pairs[:, start : start + size] += powers.sum(2) - no_pairs.sum(1).unsqueeze(-1)
        in_pairs[:, start:] += powers.sum(1) - no_pairs.sum(0).unsqueeze(-1)
    return log_rest, in_pairs.sum(1, keepdim=True) / 2, in_pairs


def _powers(x: Tensor, num_powers: int) -> Tensor:
    """Return the first one or two powers of a tensor, along a new dim on the left."""
    return torch.stack([x, x.square()]) if num_powers == 2 else x.unsqueeze(0)


def _subset_blocks(n: int, r: int, like: Tensor) -> Iterator[Tensor]:
    """Yield the r-subsets of 0..n-1 as the columns of index tensors of shape (r, block)."""
    subsets = torch.full((1, 1), -1, device=like.device)  # the empty subset
    for size in range(1, r + 1):
        last = subsets[-1]
        count = n - 1 - last
        # The children of a subset end in last + 1, ..., n - 1. Its first child is at this position.
        rank = count.cumsum(0) - count
        total = math.comb(n, size)
        grown = torch.cat([subsets, (last + 1 - rank).unsqueeze(0)])
        subsets = grown.repeat_interleave(count, dim=1, output_size=total)
        subsets[-1] += torch.arange(total, device=like.device)
    block = max(1, _BLOCK_NUMEL // max(1, r * like.shape[1]))
    yield from subsets[1:].split(block, dim=1)
