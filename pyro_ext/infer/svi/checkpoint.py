"""The state of a training run: parameters, buffers and optimisers, and its file."""

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_ext._private.of_pyro import waiting_states
from pyro_ext._private.of_torch import buffers_of
from pyro_ext.infer.svi.capture.graph_inputs import current_params
from pyro_ext.infer.svi.capture.reachable_state import ReachableState

_FORMAT = "pyro_ext training run, 1"

StrPath = str | os.PathLike[str]


def optimizer_state(optim: PyroOptim) -> dict[str, Any]:
    """The states of a ``PyroOptim``, with those that wait for their parameters."""
    return {**waiting_states(optim), **optim.get_state()}


@dataclass(frozen=True)
class ProgramState:
    """Parameters, buffers and optimisers.

    :param ReachableState reachable: what the programs reach, for parameters and buffers of
        modules.
    :param called: the modules that the programs call, in this order.
    :param PyroOptim optim: the optimiser.
    """

    reachable: ReachableState
    called: Sequence[nn.Module]
    optim: PyroOptim

    def copy(self) -> dict[str, Any]:
        """A copy for a file."""
        return {
            "params": _copies(current_params()),
            "constraints": pyro.get_param_store().get_state()["constraints"],
            "modules": _copies(self.reachable.state),
            "called": [(_kind(module), _copies(buffers_of(module))) for module in self.called],
            "optim": optimizer_state(self.optim),
            "optimizer": self._optimizer,
        }

    def load(self, state: dict[str, Any], used: Iterable[str]) -> None:
        """Restores a copy in place, once the programs have run.

        :param dict state: the result of :meth:`copy`.
        :param used: the names of the parameters that the programs use.
        :raises ValueError: if the programs or the optimiser are others; nothing is changed then.
        """
        params, saved_params = current_params(), state["params"]
        in_modules = self.reachable.state
        _check_names("parameter", set(used) - saved_params.keys(), saved_params)
        _check_names("tensor", state["modules"].keys() ^ in_modules.keys(), in_modules)
        kinds = [kind for kind, _ in state["called"]]
        found = [_kind(module) for module in self.called]
        if kinds != found:
            raise ValueError(
                f"Checkpoint: expected programs that call the modules {kinds}, got {found}."
            )
        if state["optimizer"] != self._optimizer:
            raise ValueError(
                f"Checkpoint: expected the optimiser {state['optimizer']}, got {self._optimizer}."
            )
        pairs = [(name, in_modules[name], saved) for name, saved in state["modules"].items()]
        pairs += [
            (f"{kind}.{name}", module.get_buffer(name), saved)
            for module, (kind, buffers) in zip(self.called, state["called"], strict=True)
            for name, saved in buffers.items()
        ]
        known = [name for name in saved_params if name in params]
        pairs += [(name, params[name], saved_params[name]) for name in known]
        for name, tensor, saved in pairs:
            if tensor.shape != saved.shape:
                raise ValueError(
                    f"Checkpoint: '{name}' has shape {tuple(saved.shape)} there and "
                    f"{tuple(tensor.shape)} in the programs: expected the same."
                )
        with torch.no_grad():
            for _, tensor, saved in pairs:
                tensor.copy_(saved)
        late = {name: x.requires_grad_() for name, x in saved_params.items() if name not in params}
        constraints = {name: state["constraints"][name] for name in late}
        pyro.get_param_store().set_state({"params": late, "constraints": constraints})
        # Pyro makes the optimisers anew, with the states that are waiting for them.
        self.optim.optim_objs.clear()
        waiting_states(self.optim).clear()
        self.optim.set_state(state["optim"])

    @property
    def _optimizer(self) -> str:
        constructor = self.optim.pt_optim_constructor
        return str(getattr(constructor, "__name__", constructor))


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items() if x is not None}


def _check_names(kind: str, wrong: set[str], expected: Iterable[str]) -> None:
    if wrong:
        raise ValueError(
            f"Checkpoint: expected the model and guide that it was saved with, whose {kind}s are "
            f"{sorted(expected)}; {sorted(wrong)} are on one side only."
        )


def write(state: dict[str, Any], path: StrPath) -> None:
    """Saves a state to a file, which is the old one or the new one whatever happens."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save({"format": _FORMAT, **state}, unfinished)
    unfinished.replace(path)


def read(path: StrPath) -> dict[str, Any]:
    """Loads what :func:`write` saved; from a file that is trusted, for it is a pickle.

    :raises ValueError: if it is something else.
    :raises OSError: if it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        state = torch.load(io.BytesIO(data), weights_only=False)
    except Exception as error:
        raise ValueError(
            f"Checkpoint: expected a file that was saved by run, got {path}."
        ) from error
    if not (isinstance(state, dict) and state.get("format") == _FORMAT):
        raise ValueError(f"Checkpoint: expected {path} to be a '{_FORMAT}'.")
    return state
