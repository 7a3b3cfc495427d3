"""Finds the tensors that a graph reads, and checks that they still fit the graph."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
from torch import Tensor

from pyro_ext.infer.svi.capture.reachable_state import Place, ReachableState


class Arguments(NamedTuple):
    """The arguments of model and guide, as leaves and their structure."""

    leaves: list[Any]
    spec: Any

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def aliases(self) -> "Arguments":
        """The same arguments, with a view in place of each tensor.

        The programs may reach the same tensor by a name, too. The view tells the two apart.
        """
        views = [leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Arguments(views, self.spec)


@dataclass(frozen=True)
class TensorSource:
    """The place where each step finds a tensor that the graph reads."""

    tensor: Tensor
    place: Place | None
    param: str | None
    layout: tuple[Any, ...]

    def get(self, params: dict[str, Tensor]) -> Tensor | None:
        """Return the current tensor at this place, or None if it does not fit the graph."""
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
    """Find the place of an external tensor of a run.

    It is in the param store, or has a name. Otherwise the source keeps the tensor itself.
    """
    name = next((name for name, param in params.items() if param is tensor), None)
    place = reachable.place_of(tensor) if name is None else None
    return TensorSource(tensor, place, name, layout(tensor))


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return the properties of a tensor that are fixed in a graph."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def current_params() -> dict[str, Tensor]:
    """Return the unconstrained parameters in the param store, by name."""
    return dict(pyro.get_param_store().named_parameters())


def params_of(trace: Any) -> dict[str, Tensor]:
    """Return the unconstrained parameters in a trace of parameters only, by name."""
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items()}
