from typing import Any

import torch
from torch import Tensor, nn

from pyro_ext._arguments import check_integer, check_type


class LeadingDims(nn.Module):
    """A wrapper that gives a module with one batch dim any number of leading dims.

    The leading dims of the inputs are broadcast together and flattened into one. The module runs
    once, and its outputs get the leading dims back. A convolution can then take
    ``(K, B, C, H, W)``: K particles of B images.

    A module that couples the entries of its batch, such as BatchNorm in training mode, also couples
    the particles. :meth:`pyro_ext.infer.MultiSampleELBO.check` detects this.

    :param module: the module. It takes tensors of shape ``(batch, *event)``, and returns a tensor,
        or a tuple or list of tensors, of shape ``(batch, ...)``.
    :param event_dim: the number of dims >= 0 on the right of an input that make up one example: 1
        for vectors, 3 for images.
    :raises TypeError: if an argument, an input or an output has the wrong type.
    :raises ValueError: if ``event_dim`` is negative. A call raises it if an input has fewer dims,
        if the leading dims do not broadcast, or if the module changes the size of the batch.

    >>> net = LeadingDims(nn.Conv2d(3, 8, kernel_size=3, padding=1), event_dim=3)
    >>> net(torch.zeros(5, 2, 3, 16, 16)).shape
    torch.Size([5, 2, 8, 16, 16])
    """

    def __init__(self, module: nn.Module, event_dim: int) -> None:
        super().__init__()
        check_type("LeadingDims", "module", module, nn.Module, "a torch.nn.Module")
        check_integer("LeadingDims", "event_dim", event_dim, 0)
        self.module = module
        self.event_dim = event_dim

    def forward(self, *inputs: Tensor) -> Any:
        """Call the module on the flattened inputs.

        :param inputs: tensors of shape ``(..., *event)``.
        :returns: the outputs of the module, with the leading dims of the inputs.
        """
        for position, x in enumerate(inputs):
            check_type("LeadingDims", f"input {position}", x, Tensor, "a tensor")
            if x.dim() < self.event_dim:
                raise ValueError(
                    f"LeadingDims: input {position} has shape {tuple(x.shape)}, which has fewer "
                    f"dims than event_dim={self.event_dim}. Pass an input with more dims, or a "
                    "smaller event_dim."
                )
        shapes = [x.shape[: x.dim() - self.event_dim] for x in inputs]
        try:
            leading = torch.broadcast_shapes(*shapes)
        except RuntimeError as error:
            raise ValueError(
                "LeadingDims: the leading dims of the inputs do not broadcast: "
                f"{[tuple(shape) for shape in shapes]}."
            ) from error
        events = [x.shape[x.dim() - self.event_dim :] for x in inputs]
        flat = [
            x.expand(leading + event).reshape(leading.numel(), *event)
            for x, event in zip(inputs, events, strict=True)
        ]
        output = self.module(*flat)
        if isinstance(output, Tensor):
            return self._restore(output, leading)
        return type(output)(self._restore(part, leading) for part in output)

    def _restore(self, output: Tensor, leading: torch.Size) -> Tensor:
        name = f"the output of {type(self.module).__name__}"
        check_type("LeadingDims", name, output, Tensor, "a tensor, or a tuple or list of tensors")
        if output.dim() == 0 or output.shape[0] != leading.numel():
            raise ValueError(
                f"LeadingDims: {name} has shape {tuple(output.shape)}. The module must keep the "
                f"batch of {leading.numel()} as its first dim."
            )
        return output.reshape(*leading, *output.shape[1:])

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return f"event_dim={self.event_dim}"
