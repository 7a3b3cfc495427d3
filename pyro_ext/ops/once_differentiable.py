"""What functions with gradients of their own need to know and to refuse."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ext._private.of_torch import is_in_transform


def is_traced() -> bool:
    """Whether operations are recorded by ``torch.compile`` or ``make_fx``."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor is that of a transform of ``torch.func``, or of batched gradients."""
    return not is_traced() and is_in_transform(x)


def may_need_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked for; under ``vmap`` no tensor tells."""
    return torch.is_grad_enabled() and any(x.requires_grad or is_transformed(x) for x in tensors)


def once_differentiable(gradient: Tensor, x: Tensor, message: str) -> Tensor:
    """A gradient that refuses to pass for a constant where it is differentiated again.

    :param torch.Tensor gradient: the values of a first derivative.
    :param torch.Tensor x: what it depends on.
    :param str message: of the NotImplementedError.
    """
    return _Once.apply(gradient, x, message)


def zero_with_derivative(derivative: Tensor, x: Tensor, message: str) -> Tensor:
    """Zeros that depend on a tensor by a given derivative, element by element.

    :param torch.Tensor derivative: of the shape of the result.
    :param torch.Tensor x: a tensor that broadcasts to that shape, in the same dtype.
    :param str message: of the NotImplementedError where it is differentiated twice.
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
