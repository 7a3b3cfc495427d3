"""Finds the tensors that a graph reads, and checks that they still fit the graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from torch import Tensor

from pyro_ext._private.of_torch import pytree
from pyro_ext.infer.svi.capture.reachable_state import Place, ReachableState


class Arguments(NamedTuple):
    """The arguments of model and guide, as leaves and their structure.

    The structure is None if they are positional tensors only.
    """

    leaves: list[Any]
    spec: Any

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Return the arguments of a step."""
        if not kwargs and all(type(arg) is Tensor for arg in args):
            return Arguments(list(args), None)
        return Arguments(*pytree.tree_flatten((args, kwargs)))

    def unflatten(self) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the positional and keyword arguments."""
        if self.spec is None:
            return self.leaves, {}
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    @property
    def names(self) -> list[str]:
        """The names of the leaves, such as ``args[0]`` and ``kwargs['mask']``."""
        args, kwargs = self.unflatten()
        return [
            name + pytree.keystr(path)
            for name, tree in (("args", args), ("kwargs", kwargs))
            for path, _ in pytree.tree_flatten_with_path(tree)[0]
        ]

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
    """The places where each step finds a tensor that the graph reads."""

    tensor: Tensor
    places: list[Place]
    param: str | None
    layout: tuple[Any, ...]

    def get(self, params: dict[str, Tensor]) -> Tensor | None:
        """Return the current tensor at these places, or None if it does not fit the graph."""
        if self.param is not None:
            now: Any = params.get(self.param)
            # A module may hold another parameter now, which the store does not have yet.
            for place in self.places:
                held = place.get()
                if held is not now and held is not self.tensor:
                    return None
        elif self.places:
            now = self.places[0].get()
            if any(place.get() is not now for place in self.places[1:]):
                return None  # nothing shows which of the places the programs read
        else:
            now = self.tensor
        return now if isinstance(now, Tensor) and layout(now) == self.layout else None


def find_source(
    tensor: Tensor, params: dict[str, Tensor], reachable: ReachableState
) -> TensorSource:
    """Find the places of an external tensor of a run.

    It is in the param store, or has names. Otherwise the source keeps the tensor itself.
    """
    name = next((name for name, param in params.items() if param is tensor), None)
    return TensorSource(tensor, reachable.places_of(tensor), name, layout(tensor))


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return the properties of a tensor that are fixed in a graph."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


#: Parameters of modules: the dict of a module and a key in it, by name.
OwnParams = dict[str, tuple[dict[str, Any], str]]


def current_params(own: OwnParams | None = None) -> dict[str, Tensor]:
    """Return the unconstrained parameters in the param store and in given places, by name."""
    params = {name: _plain(x) for name, x in pyro.get_param_store().named_parameters()}
    return {**read_params(own), **params} if own else params


def read_params(own: OwnParams) -> dict[str, Any]:
    """Return the parameters that are in the places of some parameters now, by name."""
    return {name: holder.get(key) for name, (holder, key) in own.items()}


@contextmanager
def no_new_params() -> Iterator[None]:
    """Remove the parameters that a block adds to the param store."""
    known = set(current_params())
    try:
        yield
    finally:
        for name in current_params().keys() - known:
            del pyro.get_param_store()[name]


@contextmanager
def params_kept_in_place() -> Iterator[None]:
    """Copy the parameters that a block replaces in the param store into the earlier tensors.

    The averages of Pyro's decaying baselines are such parameters.
    """
    before = current_params()
    replaced: dict[str, Tensor] = {}
    try:
        yield
        for name, param in current_params().items():
            if before.get(name, param) is not param:
                replaced[name] = before[name]
                with torch.no_grad():
                    before[name].copy_(param)
    finally:
        pyro.get_param_store().set_state({"params": replaced, "constraints": {}})


def _plain(x: Tensor) -> Tensor:
    """Return a parameter without its provenance, which the averages of Pyro's baselines have."""
    return detach_provenance(x) if isinstance(x, ProvenanceTensor) else x


def params_of(trace: Any) -> dict[str, Tensor]:
    """Return the unconstrained parameters in a trace of parameters only, by name."""
    values = {name: site["value"] for name, site in trace.nodes.items()}
    # A parameter outside of the param store is a plain tensor.
    return {
        name: _plain(getattr(x, "unconstrained", lambda x=x: x)()) for name, x in values.items()
    }
