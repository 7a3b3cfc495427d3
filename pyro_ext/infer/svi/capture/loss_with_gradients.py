"""A loss whose gradients are known before ``backward``."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def loss_with_gradients(
    loss: Tensor, gradients: Sequence[Tensor | None], params: Sequence[Tensor]
) -> Tensor:
    """Return a loss that has given gradients.

    :param loss: the value of the loss, without dims.
    :param gradients: its gradients, one for each parameter. More tensors may follow them.
    :param params: the parameters.
    :returns: the loss. Its gradients can not be differentiated again.
    """
    pairs = [(x, param) for x, param in zip(gradients, params, strict=False) if x is not None]
    return (
        _Loss.apply([loss], [x for x, _ in pairs], *(param for _, param in pairs))
        if pairs
        else loss
    )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: list[Tensor], gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.params = params
        return loss[0]

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _Once.apply(len(gradients), *gradients, *ctx.params, scale)
        # On a GPU, the comparison would wait for the device.
        if scale.is_cuda or scale.item() != 1:
            gradients = [x * scale.to(x) for x in gradients]
        return None, None, *gradients


class _Once(torch.autograd.Function):
    """The identity for gradients, which depend on parameters in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotImplementedError(
            "compile_elbo: a compiled loss has no second derivatives. For these, call "
            "elbo(model, guide) without compile_elbo."
        )
