"""Losses that stay on the device for some steps, so that no step waits for it."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_ext.tracing import Program


@dataclass
class UnreadLosses:
    """The losses of steps that are still on the device.

    :ivar owner: the name of the SVI class, for messages.
    :ivar every: the number of losses that are read at once.
    :ivar num_steps: the number of steps so far.
    """

    owner: str
    every: int
    num_steps: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def added(self, loss: Any) -> Any:
        """Add the loss of a step, and read the losses if there are enough.

        :returns: the loss as a tensor. Several losses of a step are returned as they are.
        """
        self.num_steps += 1
        if isinstance(loss, tuple):
            return loss
        loss = torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
        self.losses.append(loss)
        if len(self.losses) >= self.every:
            self.read()
        return loss

    def read(self) -> None:
        """Read the losses, which waits for the device.

        :raises ValueError: if a loss is not finite.
        """
        losses, self.losses = self.losses, []
        first = self.num_steps - len(losses) + 1
        for step, loss in enumerate(read_together(losses), start=first):
            if not math.isfinite(loss):
                raise ValueError(
                    f"{self.owner}: the loss of step {step} is {loss}, read after step "
                    f"{self.num_steps}. Check the data, the parameters and the learning rate. The "
                    "gradients of this step were not used."
                )


def read_together(losses: list[Tensor]) -> list[float]:
    """Return losses as floats, and wait for the device once."""
    if len({(loss.device, loss.dtype) for loss in losses}) != 1:
        return [loss.item() for loss in losses]
    values: list[float] = torch.stack(losses).tolist()
    return values


def has_late_loss(objective: Any) -> bool:
    """Return whether an objective can leave its loss on the device."""
    elbo = getattr(objective, "elbo", objective)
    is_chunked = getattr(elbo, "particle_chunk_size", None) is not None
    return hasattr(elbo, "differentiable_loss") and not is_chunked


def late_loss(
    objective: Any,
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the loss on the device, and add its gradients to those of the parameters."""
    loss: Tensor = objective.differentiable_loss(model, guide, *args, **kwargs)
    if loss.requires_grad:
        elbo = getattr(objective, "elbo", objective)
        loss.backward(retain_graph=elbo.retain_graph)
    return loss.detach()
