"""The log density of a mixture of normals with mean zero, without a dim for the components."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from pyro_ext.ops.fused import Fused
from pyro_ext.ops.once_differentiable import is_compiled_later, is_traced, is_transformed

#: The number of values that are computed at once on a CPU.
BLOCK_SIZE = 2**16


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
    _, exponent = standardize(value.to(scales.dtype).unsqueeze(-1), scales)
    return _constants(scales, log_weights) + exponent


def standardize(
    value: Tensor, scales: Tensor, reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the ratio of values to scales, and the exponent of a relative normal density.

    .. math:: z = x / \sigma, \qquad (z_0^2 - z^2) / 2

    A ratio is at most the largest number of the dtype in size. The exponent may be infinite, but
    the derivatives of both in values and scales do not overflow before they have to, and a gradient
    of zero stays zero.

    :param value: real numbers that broadcast with the scales, in their dtype.
    :param scales: numbers > 0.
    :param reference: the ratio z_0, as a constant; zero by default.

    >>> standardize(torch.tensor([3.0, math.inf]), torch.tensor(2.0))
    (tensor([1.5000e+00, 3.4028e+38]), tensor([-1.1250,    -inf]))
    """
    if reference is None:
        reference = scales.new_zeros(())
    # Dynamo cannot trace functions that define a forward mode.
    function = _Standardize if torch.compiler.is_compiling() else _StandardizeWithForwardMode
    return function.apply(value, scales, reference)


class _Standardize(torch.autograd.Function):
    """Autograd's own derivatives would form z^2 or 1 / scale^2, which overflow first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, scales: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        z = _ratio(value, scales)
        exponent = (reference - z).mul_(torch.add(reference / 2, z, alpha=0.5))
        # Finite also where a component without weight has the smaller ratio: -inf + inf is NaN.
        return z, exponent.clamp(max=torch.finfo(scales.dtype).max)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shapes = [x.shape for x in inputs[:2]]
        ctx.save_for_backward(inputs[1], output[0])
        ctx.save_for_forward(inputs[1], output[0])

    @staticmethod
    def backward(ctx: Any, by_z: Tensor, by_exponent: Tensor) -> tuple[Tensor, Tensor, None]:
        scales, z = ctx.saved_tensors
        by_value = (by_exponent * z - by_z) / scales
        of_value, of_scales = ctx.shapes
        return -by_value.sum_to_size(of_value), (by_value * z).sum_to_size(of_scales), None


class _StandardizeWithForwardMode(_Standardize):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        scales, z = ctx.saved_tensors
        by_value, by_scales = (0.0 if x is None else x for x in tangents[:2])
        by_z = (by_value - z * by_scales) / scales
        return by_z, -z * by_z


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
    relative, smallest = _relative_log_densities(value, scales, log_weights)
    return (relative.logsumexp(-1) - smallest * (smallest / 2)).to(dtype)


def _relative_log_densities(
    value: Tensor, scales: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log densities without the term of the widest component, and its ratio z.

    The term -z^2 / 2 may overflow. The difference to it is zero for the widest component, and may
    be minus infinity for the others. So the shares of the components are always defined.
    """
    # The ratio cancels in the sum of both results, so it needs no gradient.
    widest = scales.detach().masked_fill(log_weights.detach() == -math.inf, 0.0).amax(-1)
    smallest = _ratio(value.detach().to(scales.dtype), widest)
    _, exponent = standardize(value.to(scales.dtype).unsqueeze(-1), scales, smallest.unsqueeze(-1))
    return _constants(scales, log_weights) + exponent, smallest


def _ratio(value: Tensor, scales: Tensor) -> Tensor:
    largest = torch.finfo(scales.dtype).max
    return (value / scales).clamp(-largest, largest)


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
        components = _components(scales, log_weights)
        is_blocked = value.device.type == "cpu" and not is_compiled_later()
        step = BLOCK_SIZE if is_blocked else max(len(flat), 1)
        options = {"dtype": dtype, "dtype_of_slope": wide}
        for block, run in _kernel.in_blocks(len(flat), step, **options):
            out = [x[block] for x in (log_prob, derivative) if x is not None]
            run(flat[block], *components, out=out)
        ctx.save_for_backward(value, scales, log_weights, derivative)
        return log_prob.reshape(value.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        value, scales, log_weights, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():
            relative, _ = _relative_log_densities(value, scales, log_weights)
            z, _ = standardize(value.to(scales.dtype).unsqueeze(-1), scales)
            by_value = -(relative.softmax(-1) * z / scales).sum(-1)
        else:
            by_value = derivative.reshape(value.shape)
        return (grad * by_value).to(value.dtype), None, None, None


def _components(scales: Tensor, log_weights: Tensor) -> tuple[Tensor, ...]:
    """Return what :func:`_evaluate` needs of components whose scales are of shape ``(K,)``.

    They are in units of the first one's scale and of the largest weighted density at zero. The
    scale is multiplied by the root of two: z^2 / 2 is then a square, which overflows last.
    """
    constants = _constants(scales, log_weights)
    # A ratio of scales whose square overflows: the number is finite, so that x 0 is not NaN.
    precisions = (scales[0] / scales).square().clamp(max=torch.finfo(scales.dtype).max)
    largest = constants.amax()
    return scales[0] * math.sqrt(2), largest, constants - largest, precisions


def _evaluate(
    x: Tensor,
    scale: Tensor,
    constant: Tensor,
    constants: Tensor,
    precisions: Tensor,
    *,
    dtype: torch.dtype,
    dtype_of_slope: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the log density of a block, and its derivative.

    Components are added one by one, without the term of the first one, which may overflow.
    """
    z = x.to(scale.dtype) / scale
    square = z.square()
    # The product with an excess of zero is zero, also where the square overflows.
    finite = square.clamp(max=torch.finfo(scale.dtype).max)
    total, mean_precision = constants[0], precisions[0]
    for k in range(1, len(constants)):
        log_density = torch.addcmul(constants[k], finite, precisions[k] - 1, value=-1)
        share, total = _add(log_density, total)
        mean_precision = torch.lerp(mean_precision, precisions[k], share)
    log_prob = (constant - square).add_(total)
    slope = z.mul_(mean_precision).mul_(-2).div_(scale)
    return log_prob.to(dtype), slope.to(dtype_of_slope)


def _add(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of ``exp(x)`` in ``exp(x) + exp(y)``, and the logarithm of this sum."""
    difference = x - y
    if not is_compiled_later():
        return difference.sigmoid_(), torch.logaddexp(x, y)
    # A compiler makes one pass of this, with one exponential less.
    ratio = difference.abs().neg_().exp_()
    share = torch.where(difference > 0, 1.0, ratio) / (1 + ratio)
    return share, torch.maximum(x, y) + ratio.log1p()


_kernel = Fused(_evaluate)
