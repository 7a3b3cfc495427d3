import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext.ops.precision import accumulation_dtype


def log_mean_exp(log_w: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    r"""Return the log of the mean weight, computed from log weights.

    .. math:: \log \frac{1}{K} \sum_{k=1}^K e^{\ell_k}

    The gradient equals the normalised weights, :math:`\mathrm{softmax}(\ell)`, which sum to one.

    :param log_w: log weights of any shape and floating dtype. Entries may be ``-inf``. If all
        entries are ``-inf``, the value is ``-inf`` and the gradient is NaN.
    :param dim: the dim of size K >= 1 over which the mean is taken.
    :returns: a tensor with the shape of ``log_w`` without ``dim``.
    :raises ValueError: if ``dim`` has size zero.

    >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
    tensor(1000.)
    """
    K = log_w.shape[dim]
    if K == 0:
        raise ValueError(f"log_mean_exp: dim {dim} of log_w is empty. Pass at least one weight.")
    wide = log_w.float() if log_w.dtype in (torch.float16, torch.bfloat16) else log_w
    return (torch.logsumexp(wide, dim) - math.log(K)).to(log_w.dtype)


def leave_one_out_log_mean_exp(
    log_w: Float[Tensor, "*shape"], dim: int = 0
) -> Float[Tensor, "*shape"]:
    r"""Return, for each weight, the log of the mean of all other weights.

    .. math:: L_{-k} = \log \frac{1}{K-1} \sum_{i \ne k} e^{\ell_i}

    No digits cancel. The mean without the largest weight is a separate sum, and any other weight is
    at most half of the total.

    :param log_w: log weights of any shape and floating dtype. Entries may be ``-inf``.
    :param dim: the dim of size K >= 2 along which one weight at a time is left out.
    :returns: a tensor with the shape of ``log_w``. It is ``-inf`` where all other log weights are
        ``-inf``.
    :raises ValueError: if ``dim`` has fewer than two entries.

    Source: Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives.

    >>> log_w = torch.tensor([0.0, 0.0, 500.0])
    >>> leave_one_out_log_mean_exp(log_w)
    tensor([499.3069, 499.3069,   0.0000])
    """
    num_others = _num_others("leave_one_out_log_mean_exp", log_w, dim)
    wide = log_w.to(accumulation_dtype(log_w.device))
    top = wide.detach().amax(dim, keepdim=True)
    relative = wide - top.masked_fill(top.isinf(), 0.0)
    position = wide.argmax(dim, keepdim=True)
    largest = torch.zeros_like(wide, dtype=torch.bool).scatter(dim, position, True)
    total = relative.logsumexp(dim, keepdim=True)
    # Mask before the exponential. Otherwise the branch not taken has NaN in its gradient.
    share = (relative - total).masked_fill(largest | (wide == -math.inf), -math.inf).exp()
    others = top + total + torch.log1p(-share)
    without_largest = wide.masked_fill(largest, -math.inf).logsumexp(dim, keepdim=True)
    result = torch.where(largest, without_largest, others) - math.log(num_others)
    return result.to(log_w.dtype)


def leave_one_out_mean(log_w: Float[Tensor, "*shape"], dim: int = 0) -> Float[Tensor, "*shape"]:
    r"""Return, for each log weight, the mean of all other log weights.

    .. math:: \bar\ell_{-k} = \frac{1}{K-1} \sum_{i \ne k} \ell_i

    :param log_w: log weights of any shape and floating dtype. Entries may be ``-inf``.
    :param dim: the dim of size K >= 2 along which one entry at a time is left out.
    :returns: a tensor with the shape of ``log_w``. It is ``-inf`` where any other entry is
        ``-inf``.
    :raises ValueError: if ``dim`` has fewer than two entries.

    Source: Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives.

    >>> leave_one_out_mean(torch.tensor([1.0, 2.0, 6.0]))
    tensor([4.0000, 3.5000, 1.5000])
    """
    num_others = _num_others("leave_one_out_mean", log_w, dim)
    is_zero = log_w == -math.inf
    finite = log_w.masked_fill(is_zero, 0.0)
    mean = (finite.sum(dim, keepdim=True) - finite) / num_others
    num_zeros_elsewhere = is_zero.sum(dim, keepdim=True) - is_zero.long()
    return mean.masked_fill(num_zeros_elsewhere > 0, -math.inf)


def _num_others(owner: str, log_w: Tensor, dim: int) -> int:
    K = log_w.shape[dim]
    if K < 2:
        raise ValueError(
            f"{owner}: dim {dim} of log_w must hold at least 2 weights, but its size is {K}."
        )
    return K - 1
