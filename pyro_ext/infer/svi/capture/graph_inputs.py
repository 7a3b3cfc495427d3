"""The tensors that a graph reads: where each is found, and what the graph takes for granted."""

from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor

from pyro_ext.infer.svi.capture.reachable_state import Place, ReachableState


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor that a graph reads is found at each step."""

    tensor: Tensor
    place: Place | None
    param: str | None

    def get(self, params: dict[str, Tensor]) -> Tensor | None:
        """The tensor that is there now, whether the same or another; None if there is none."""
        if self.param is not None:
            return params.get(self.param)
        if self.place is None:
            return self.tensor
        value = self.place.get()
        return value if isinstance(value, Tensor) else None


def find_source(tensor: Tensor, params: dict[str, Tensor], around: ReachableState) -> TensorSource:
    """Where an external tensor of a run is found: param store, a name, or by itself alone."""
    for name, param in params.items():
        if param is tensor:
            return TensorSource(tensor, None, name)
    return TensorSource(tensor, around.place_of(tensor), None)


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph takes for granted of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def current_params() -> dict[str, Tensor]:
    """The unconstrained parameters in the param store, by name."""
    return dict(pyro.get_param_store().named_parameters())
