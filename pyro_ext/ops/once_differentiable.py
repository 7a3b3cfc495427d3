"""Helpers for functions that define their own gradients."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ext._private.of_torch import Recorder, dispatch_modes, is_in_transform


def is_traced() -> bool:
    """Return whether ``torch.compile`` or ``make_fx`` is recording operations."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def is_compiled_later() -> bool:
    """Return whether operations are recorded for a compiler, which fuses them."""
    return is_traced() or any(isinstance(mode, Recorder) for mode in dispatch_modes())


def is_transformed(x: Tensor) -> bool:
    """Return whether a tensor is part of a ``torch.func`` transform or of batched gradients."""
    return not is_traced() and is_in_transform(x)


def may_need_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd may ask for a gradient in some tensors.

    Under ``vmap`` a tensor does not show whether it requires a gradient, so the answer is then
    True.

    :param tensors: tensors of any shape.
    :returns: whether gradients are enabled and a tensor requires one or is transformed.

    >>> may_need_gradient(torch.ones(2)), may_need_gradient(torch.ones(2, requires_grad=True))
    (False, True)
    """
    return torch.is_grad_enabled() and any(x.requires_grad or is_transformed(x) for x in tensors)


def once_differentiable(gradient: Tensor, x: Tensor, message: str) -> Tensor:
    """Return a first derivative that raises an error when it is differentiated again.

    Without this, autograd would treat the derivative as a constant.

    :param gradient: the values of the first derivative, of any shape.
    :param x: the tensor on which the derivative depends.
    :param message: the message of the error.
    :returns: a tensor with the values of ``gradient``.
    :raises NotImplementedError: in a backward pass through the result.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> once_differentiable(2 * x.detach(), x, "x^2 can be differentiated once.").item()
    6.0
    """
    return _Once.apply(gradient, x, message)


def zero_with_derivative(derivative: Tensor, x: Tensor, message: str) -> Tensor:
    """Return zeros that have a given derivative in a tensor, element by element.

    :param derivative: the derivative, of the shape of the result.
    :param x: a tensor that broadcasts to that shape, in the same dtype.
    :param message: the message of the NotImplementedError if the result is differentiated twice.
    :returns: a tensor of zeros.
    """
    return _Zero.apply(derivative, x.expand(derivative.shape), message)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, message: str) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> NoReturn:
        raise NotImplementedError(ctx.message)


class _Zero(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, x: Tensor, message: str) -> Tensor:
        return torch.zeros_like(derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        *tensors, ctx.message = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        derivative, x = ctx.saved_tensors
        return None, grad * once_differentiable(derivative, x, ctx.message), None
