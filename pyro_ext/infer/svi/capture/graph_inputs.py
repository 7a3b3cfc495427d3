"""The tensors that a graph reads: where each is found, and what the graph takes for granted."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
from torch import Tensor

from pyro_ext.infer.svi.capture.reachable_state import Place, ReachableState


class Arguments(NamedTuple):
    """The arguments of the programs: their leaves, and their structure."""

    leaves: list[Any]
    spec: Any

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def aliases(self) -> "Arguments":
        """The same with views. The programs may know an argument by another way, too."""
        views = [leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Arguments(views, self.spec)


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor that a graph reads is found at each step."""

    tensor: Tensor
    place: Place | None
    param: str | None
    layout: tuple[Any, ...]

    def get(self, params: dict[str, Tensor]) -> Tensor | None:
        """The tensor of now, whether the same or another; None if it does not fit."""
        if self.param is not None:
            now = params.get(self.param)
        elif self.place is None:
            now = self.tensor
        else:
            value = self.place.get()
            now = value if isinstance(value, Tensor) else None
        return now if now is not None and layout(now) == self.layout else None


def find_source(
    tensor: Tensor, params: dict[str, Tensor], reachable: ReachableState
) -> TensorSource:
    """Where an external tensor of a run is found: param store, a name, or by itself alone."""
    name = next((name for name, param in params.items() if param is tensor), None)
    place = reachable.place_of(tensor) if name is None else None
    return TensorSource(tensor, place, name, layout(tensor))


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph takes for granted of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def current_params() -> dict[str, Tensor]:
    """The unconstrained parameters in the param store, by name."""
    return dict(pyro.get_param_store().named_parameters())


def params_of(trace: Any) -> dict[str, Tensor]:
    """The unconstrained parameters in a trace of parameters alone, by name."""
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items()}
