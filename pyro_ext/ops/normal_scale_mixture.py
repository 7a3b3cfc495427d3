"""The log density of a mixture of normals with mean zero, without a dim for the components."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import softplus

from pyro_ext.ops.once_differentiable import is_traced, is_transformed

#: The number of values that are computed at once on a CPU.
BLOCK_SIZE = 2**17


def normal_scale_mixture_log_densities(
    value: Tensor, scales: Float[Tensor, "*#batch K"], log_weights: Float[Tensor, "*#batch K"]
) -> Float[Tensor, "... K"]:
    r"""Return the log of each component's weighted density, in the dtype of the scales.

    .. math:: \log \pi_k + \log \mathcal{N}(x \mid 0, \sigma_k^2)

    :param value: real numbers of shape ``(...)``.
    :param scales: standard deviations > 0, of shape ``(..., K)``.
    :param log_weights: log weights of shape ``(..., K)``, in the dtype of ``scales``.
    :returns: a tensor of shape ``(..., K)``.

    >>> normal_scale_mixture_log_densities(torch.zeros(5), torch.ones(2), torch.zeros(2)).shape
    torch.Size([5, 2])
    """
    z = value.to(scales.dtype).unsqueeze(-1) / scales
    return _constants(scales, log_weights) - z.square() / 2


def normal_scale_mixture_log_prob(
    value: Tensor, scales: Tensor, log_weights: Tensor, dtype: torch.dtype
) -> Tensor:
    r"""Return the log density of a mixture of normals with mean zero.

    .. math:: \log \sum_k \pi_k \, \mathcal{N}(x \mid 0, \sigma_k^2)

    There is a fast path for values that share one set of fixed components, such as the weights of a
    network under a prior. It takes one pass over memory, which gives the derivative as well.

    :param value: real numbers of shape ``(...)``.
    :param scales: standard deviations > 0, of shape ``(..., K)``, in a wide dtype.
    :param log_weights: normalised log weights of shape ``(..., K)``, in the dtype of ``scales``.
    :param dtype: the dtype of the result.
    :returns: a tensor of the common shape of value and components, without K.

    >>> scales, log_weights = torch.tensor([1.0, 0.1]).double(), torch.tensor([0.5, 0.5]).log()
    >>> x = torch.tensor([0.0, 1.0])
    >>> normal_scale_mixture_log_prob(x, scales, log_weights.double(), torch.float32)
    tensor([ 0.7858, -2.1121])
    """
    K = scales.shape[-1]
    are_shared = scales.numel() == log_weights.numel() == K and not is_traced()
    are_fixed = not (scales.requires_grad or log_weights.requires_grad)
    is_plain = not any(map(is_transformed, (value, scales, log_weights)))
    if are_shared and are_fixed and is_plain and unpack_dual(value).tangent is None:
        return _SharedLogProb.apply(value, scales.reshape(K), log_weights.reshape(K), dtype)
    return normal_scale_mixture_log_densities(value, scales, log_weights).logsumexp(-1).to(dtype)


def _constants(
    scales: Float[Tensor, "*#batch K"], log_weights: Float[Tensor, "*#batch K"]
) -> Float[Tensor, "... K"]:
    return log_weights - scales.log() - math.log(2 * math.pi) / 2


class _SharedLogProb(torch.autograd.Function):
    """The log density for scales and log weights of shape ``(K,)``, and its derivative.

    Higher derivatives come from the plain formula.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, scales: Tensor, log_weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        flat = value.reshape(-1)
        log_prob = torch.empty_like(flat, dtype=dtype)
        # Half precision could overflow before the product with a small gradient.
        wide = torch.promote_types(flat.dtype, torch.float32)
        derivative = torch.empty_like(flat, dtype=wide) if ctx.needs_input_grad[0] else None
        # The widest component comes first, and components without weight come last.
        order = scales.masked_fill(log_weights == -math.inf, 0.0).argsort(descending=True)
        scales, log_weights = scales[order], log_weights[order]
        constants = _constants(scales, log_weights).unbind()
        precisions = scales.square().reciprocal().unbind()
        step = BLOCK_SIZE if value.device.type == "cpu" else max(len(flat), 1)
        for start in range(0, len(flat), step):
            block = slice(start, start + step)
            x = flat[block].to(scales.dtype)
            found, precision = _evaluate(x, constants, precisions)
            log_prob[block] = found
            if derivative is not None:
                derivative[block] = precision.mul_(x).neg_()
        ctx.save_for_backward(value, scales, log_weights, derivative)
        return log_prob.reshape(value.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        value, scales, log_weights, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():
            log_densities = normal_scale_mixture_log_densities(value, scales, log_weights)
            precision = (log_densities.softmax(-1) / scales.square()).sum(-1)
            by_value = -precision * value
        else:
            by_value = derivative.reshape(value.shape)
        return (grad * by_value).to(value.dtype), None, None, None


def _evaluate(
    x: Tensor, constants: tuple[Tensor, ...], precisions: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return the log density of a block, and the mean precision of the components given the value.

    Components are added one by one, the widest first. Where a narrower component adds much, both
    log densities are moderate, and no digits cancel.
    """
    square = x.square()
    log_prob = torch.addcmul(constants[0], square, precisions[0], value=-0.5)
    mean_precision = precisions[0].expand(x.shape)
    for constant, precision in zip(constants[1:], precisions[1:], strict=True):
        excess = torch.addcmul(constant, square, precision, value=-0.5).sub_(log_prob)
        log_prob.add_(softplus(excess, threshold=40.0))
        mean_precision = torch.lerp(mean_precision, precision, excess.sigmoid_())
    # At infinity each log density is -inf, and the difference of two is NaN.
    log_prob.masked_fill_(square.isinf(), -math.inf)
    return log_prob, mean_precision.clone() if len(precisions) == 1 else mean_precision
