import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_ext.ops.precision import accumulation_dtype

#: The smallest number of draws for :func:`pareto_k`, which needs five draws in the tail.
MIN_DRAWS = 21


def pareto_k(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Return the Pareto shape :math:`\hat k` of the largest importance weights.

    A generalised Pareto distribution is fitted to the :math:`\min(S / 5, 3 \sqrt S)` largest of S
    weights. The fit is the empirical Bayes estimate of Zhang and Stephens, with a weak prior at
    1/2. Weights have about :math:`1 / \hat k` finite moments. If :math:`\hat k` is above 0.7, do
    not trust an importance-sampling estimate at any affordable S.

    :param log_w: log weights of any shape and floating dtype.
    :param dim: the dim of size S that holds the draws.
    :returns: a tensor with the shape of ``log_w`` without ``dim``, in the widest dtype of the
        device. It is ``inf`` if fewer than five weights lie in the tail, because nothing can then
        be fitted. This is always the case for S < 21. It is ``-inf`` if all weights of the tail are
        equal to the largest weight, because the weights are then bounded. It is NaN if all weights
        are zero.

    Sources: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling;
    Zhang and Stephens (2009), A New and Efficient Estimation Method for the Generalized Pareto
    Distribution.

    >>> generator = torch.Generator().manual_seed(0)
    >>> uniform = torch.rand(100_000, generator=generator, dtype=torch.float64)
    >>> pareto_k(-0.6 * uniform.log()).round(decimals=1)  # weights with shape 0.6
    tensor(0.6000, dtype=torch.float64)
    """
    S = log_w.shape[dim]
    if S < MIN_DRAWS:
        return log_w.sum(dim, dtype=accumulation_dtype(log_w.device)).fill_(math.inf)
    wide = log_w.movedim(dim, -1).to(accumulation_dtype(log_w.device))
    return pareto_k_of_largest(wide.topk(tail_size(S) + 1, dim=-1, sorted=True).values)


def tail_size(num_samples: int) -> int:
    """Return how many of the largest weights :func:`pareto_k` uses."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def pareto_k_of_largest(largest: Float[Tensor, "*rest T"]) -> Float[Tensor, "*rest"]:
    """Return the Pareto shape of :func:`pareto_k`, given only the largest weights.

    :param largest: log weights in a wide dtype, in descending order along the last dim. They are
        the weights of the tail and the next smaller one.
    :returns: a tensor with the shape of ``largest`` without the last dim.
    """
    relative = largest - largest[..., :1]
    # The tail excludes ties with the cutoff. It also excludes weights below the smallest normal
    # number, which have lost digits.
    cutoff = relative[..., -1:].clamp(min=math.log(torch.finfo(largest.dtype).tiny))
    in_tail = (relative[..., :-1] > cutoff).flip(-1)
    exceedance = (relative[..., :-1].exp() - cutoff.exp()).flip(-1)
    n = in_tail.sum(-1, dtype=largest.dtype)
    k = _generalized_pareto_shape(exceedance, in_tail, n)
    k = torch.where(n < 5, math.inf, k)
    k = torch.where(n == 0, -math.inf, k)
    return torch.where(largest[..., 0].isneginf(), math.nan, k)


def _generalized_pareto_shape(
    x: Float[Tensor, "*rest T"], valid: Bool[Tensor, "*rest T"], n: Float[Tensor, "*rest"]
) -> Float[Tensor, "*rest"]:
    """Return the Pareto shape of the last ``n`` values along the last dim of ``x``.

    These values are in ascending order, and ``valid`` marks them.
    """
    size = x.shape[-1]
    n_column = n.clamp(min=1).unsqueeze(-1)  # the caller overwrites rows without a tail
    quartile_rank = (n_column / 4 + 0.5).floor().clamp(min=1)
    quartile = x.gather(-1, (size - n_column + quartile_rank).long() - 1)
    index = torch.arange(1, 31 + math.isqrt(size), dtype=x.dtype, device=x.device)
    grid_size = 30 + n_column.sqrt().floor()
    theta = (1 - (grid_size / (index - 0.5)).sqrt()) / (3 * quartile) + 1 / x[..., -1:]

    def mean_log(theta: Tensor) -> Tensor:
        return torch.log1p(-theta * x).where(valid, 0.0).sum(-1, keepdim=True) / n_column

    k_on_grid = torch.cat([mean_log(column) for column in theta.split(1, dim=-1)], dim=-1)
    # theta = 0 is the limit k = 0, the exponential distribution.
    rate = torch.where(theta == 0, n_column / x.where(valid, 0.0).sum(-1, True), -theta / k_on_grid)
    log_likelihood = n_column * (rate.log() - k_on_grid - 1)
    weights = log_likelihood.where(index <= grid_size, -math.inf).softmax(-1)
    k = mean_log((weights * theta).sum(-1, keepdim=True)).squeeze(-1)
    return (n * k + 10 * 0.5) / (n + 10)
