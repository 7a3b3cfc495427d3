"""The log mass of mixtures of discretized logistics, and its gradients."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyro_ext.ops.fused import Fused
from pyro_ext.ops.logistic_bins import evaluate_mixture
from pyro_ext.ops.logistic_passes import evaluate_by_passes
from pyro_ext.ops.once_differentiable import (
    is_compiled_later,
    is_traced,
    is_transformed,
    may_need_gradient,
)
from pyro_ext.ops.precision import promoted_dtype

#: The number of terms (points x channels x components) that are computed at once on a CPU.
BLOCK_SIZE = 2**17

# The number of slices of which a transposed copy is made.
_MANY = 64

_kernel = Fused(evaluate_mixture, evaluate_by_passes)


def discretized_logistic_mixture_log_prob(
    value: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    low: int,
    high: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return the log mass of integers under a mixture of discretized logistics.

    .. math::

        \log \sum_k \pi_k \prod_c \Bigl[ \sigma\Bigl(\frac{x_c + 1/2 - \mu_{ck}}{s_{ck}}\Bigr)
        - \sigma\Bigl(\frac{x_c - 1/2 - \mu_{ck}}{s_{ck}}\Bigr) \Bigr]

    The bins of ``low`` and ``high`` include the tails. All C channels of a point share the
    component.

    :param value: integers of shape ``(..., C)`` and any dtype. Values outside ``low..high`` give
        ``-inf``, and NaN gives NaN. Fractions are not checked.
    :param logits: unnormalised log weights of the components, of shape ``(..., K)``.
    :param loc: finite locations of shape ``(..., C, K)``, in the units of ``value``.
    :param log_scale: logarithms of the scales, from -80 to 80, of shape ``(..., C, K)``.
    :param low: the smallest integer.
    :param high: the largest integer, at least ``low``.
    :param dtype: the dtype of the result and of most of the arithmetic. By default, it is the
        common dtype of the parameters, at least float32. A wider ``loc`` or ``log_scale`` keeps its
        dtype in two places where digits cancel: the distances to the edges, and the scale.
    :returns: a tensor of the common batch shape. It can be differentiated once in ``logits``,
        ``loc`` and ``log_scale``.
    :raises ValueError: if the shapes do not match, or if ``low > high``.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++.

    >>> value = torch.arange(4.0).unsqueeze(-1)
    >>> parameters = torch.zeros(2), torch.tensor([[0.3, 2.0]]), torch.zeros(1, 2)
    >>> log_prob = discretized_logistic_mixture_log_prob(value, *parameters, low=0, high=3)
    >>> log_prob.exp().sum()
    tensor(1.)
    """
    if low > high:
        raise ValueError(
            f"discretized_logistic_mixture_log_prob: low={low} is above high={high}. Pass low <= "
            "high."
        )
    if dtype is None:
        dtype = promoted_dtype(logits, loc, log_scale)
    logits = logits.to(dtype)
    loc, log_scale = (x.to(torch.promote_types(x.dtype, dtype)) for x in (loc, log_scale))
    value = value.to(loc.dtype)
    shape = _common_shape(value, logits, loc, log_scale)
    *batch_shape, C, K = shape
    value = value.expand(*batch_shape, C)
    parameters = (
        _expand(logits, (*batch_shape, K)),
        _expand(loc, shape),
        _expand(log_scale, shape),
    )
    needs_gradient = may_need_gradient(*parameters)
    log_prob, *_ = _LogProb.apply(value, *parameters, low, high, needs_gradient)
    return log_prob.masked_fill(((value < low) | (value > high)).any(-1), -math.inf)


def _common_shape(value: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> torch.Size:
    """Return the common shape: the batch shape, the number of channels and of components."""
    try:
        if min(value.dim(), logits.dim(), loc.dim() - 1, log_scale.dim() - 1) < 1:
            raise RuntimeError("too few dims")
        of_logits = (*logits.shape[:-1], 1, *logits.shape[-1:])
        return torch.broadcast_shapes((*value.shape, 1), of_logits, loc.shape, log_scale.shape)
    except RuntimeError:
        raise ValueError(
            f"discretized_logistic_mixture_log_prob: the shapes of value {tuple(value.shape)}, "
            f"logits {tuple(logits.shape)}, loc {tuple(loc.shape)} and log_scale "
            f"{tuple(log_scale.shape)} do not match. Pass value of shape (..., C), logits of shape "
            "(..., K), and loc and log_scale of shape (..., C, K)."
        ) from None


def _expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    # The backward pass of an unnecessary expand costs a copy of the gradient.
    return x if x.shape == shape else x.expand(shape)


class _LogProb(torch.autograd.Function):
    """The log mass and, if needed, its gradients, which are computed in the same pass and saved."""

    @staticmethod
    def forward(
        value: Tensor,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        low: int,
        high: int,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *batch_shape, C, K = loc.shape
        N = math.prod(batch_shape)
        rows = value.reshape(N, C, 1), logits.reshape(N, K), loc.reshape(N, C, K)
        ends = [value.new_full((), end) for end in (low, high)]
        log_prob, *gradients = _evaluate(
            [*rows, log_scale.reshape(N, C, K)], ends, logits.dtype, needs_gradient
        )
        none = [logits.new_empty(0)] * 3
        by_logits, by_loc, by_log_scale = (
            (g.reshape(*g.shape[:-1], *batch_shape) for g in gradients) if needs_gradient else none
        )
        return log_prob.reshape(batch_shape), by_logits, by_loc, by_log_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:4], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 7
        parameters, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        scaled = (
            _Scaled.apply(grad, gradient, x)
            for gradient, x in zip(gradients, parameters, strict=True)
        )
        return None, *scaled, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = (_batch_first(info, *pair) for pair in zip(inputs[:4], in_dims, strict=False))
        output = _LogProb.apply(*tensors, *inputs[4:])
        needs_gradient = inputs[-1]
        return output, (0, *((1, 2, 2) if needs_gradient else [None] * 3))


class _Scaled(torch.autograd.Function):
    """The gradient of the log mass times the gradient of the loss.

    It raises an error if it is differentiated. Autograd would otherwise treat it as a constant.
    """

    @staticmethod
    def forward(grad: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        # Channels and components come first in a saved gradient, and last in a parameter.
        num_dims = gradient.dim() - grad.dim()
        gradient = gradient.movedim(tuple(range(num_dims)), tuple(range(-num_dims, 0)))
        grad = grad.reshape(grad.shape + (1,) * num_dims)
        if is_traced() or is_transformed(grad):
            return (gradient * grad).to(x.dtype)
        return torch.mul(gradient, grad, out=x.new_empty(gradient.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> NoReturn:
        raise NotImplementedError(
            "discretized_logistic_mixture_log_prob can only be differentiated once. Second "
            "derivatives are not available."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        grad, gradient, x = (
            _batch_first(info, *pair) for pair in zip(inputs, in_dims, strict=True)
        )
        return _Scaled.apply(grad, gradient.movedim(0, gradient.dim() - grad.dim()), x), 0


def _batch_first(info: Any, x: Tensor, dim: int | None) -> Tensor:
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def _evaluate(
    inputs: Sequence[Tensor], ends: Sequence[Tensor], dtype: torch.dtype, needs_gradient: bool
) -> Sequence[Tensor]:
    """Return the log mass and its gradients, computed in blocks that fit into a cache on a CPU.

    :param inputs: values ``(N, C, 1)``, logits ``(N, K)``, locations and log scales ``(N, C, K)``.
    """
    N, C, K = inputs[-1].shape
    if inputs[-1].device.type != "cpu" or is_compiled_later() or N == 0:
        evaluate = evaluate_mixture if is_compiled_later() else evaluate_by_passes
        return evaluate(*map(_points_last, inputs), *ends, needs_gradient=needs_gradient)
    size = max(BLOCK_SIZE // (C * K), 1)
    shapes = ((N,), (K, N), (C, K, N), (C, K, N)) if needs_gradient else ((N,),)
    out = [torch.empty(shape, dtype=dtype) for shape in shapes]
    for block, run in _kernel.in_blocks(N, size, needs_gradient=needs_gradient):
        points_last = (_points_last(x[block]) for x in inputs)
        run(*points_last, *ends, out=[x[..., block] for x in out])
    return out


def _points_last(x: Tensor) -> Tensor:
    """Return a contiguous copy with the first dim last."""
    if x[:1].numel() > _MANY:
        return x.movedim(0, -1).clone(memory_format=torch.contiguous_format)
    # This is several times faster than a transposed copy.
    return torch.stack(x.flatten(1).unbind(-1)).unflatten(0, x.shape[1:])
