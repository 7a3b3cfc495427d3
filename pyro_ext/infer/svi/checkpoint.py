"""Checkpoints: the parameters, buffers and optimiser states of a training run, in a file."""

import io
import os
from collections.abc import Collection, Iterable, Sequence
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
_MAX_NAMES = 5  # in an error message
_ADVICE = "Load it with the model and guide that saved it."

StrPath = str | os.PathLike[str]


def optimizer_state(optim: PyroOptim) -> dict[str, Any]:
    """Return the states of a ``PyroOptim``, also those that wait for their parameters."""
    return {**waiting_states(optim), **optim.get_state()}


@dataclass(frozen=True)
class ProgramState:
    """The parameters, buffers and optimiser states of a training run.

    :param reachable: the values that model and guide reach by name. It holds the parameters and
        buffers of modules.
    :param called: the modules that model and guide call, in the order of their first calls.
    :param optim: the optimiser.
    """

    reachable: ReachableState
    called: Sequence[nn.Module]
    optim: PyroOptim

    def copy(self) -> dict[str, Any]:
        """Return a copy of the state, to be written to a file."""
        return {
            "params": _copies(current_params()),
            "constraints": pyro.get_param_store().get_state()["constraints"],
            "modules": _copies(self.reachable.state),
            "called": [(_kind(module), _copies(buffers_of(module))) for module in self.called],
            "optim": optimizer_state(self.optim),
            "optimizer": self._optimizer,
        }

    def load(self, state: dict[str, Any], used: Iterable[str]) -> None:
        """Restore a copy in place, after model and guide have run.

        :param state: the result of :meth:`copy`.
        :param used: the names of the parameters that model and guide use.
        :raises ValueError: if the model, the guide or the optimiser differs from the one of the
            copy. Nothing is changed then.
        """
        params, saved_params = current_params(), state["params"]
        in_modules = self.reachable.state
        _check_names("parameter", set(used) - saved_params.keys())
        _check_names("tensor", state["modules"].keys() ^ in_modules.keys())
        kinds = [kind for kind, _ in state["called"]]
        found = [_kind(module) for module in self.called]
        if kinds != found:
            raise ValueError(
                f"Checkpoint: model and guide call the modules {_listed(found)}, but they called "
                f"{_listed(kinds)} when it was saved. {_ADVICE}"
            )
        if state["optimizer"] != self._optimizer:
            raise ValueError(
                f"Checkpoint: the optimiser is {self._optimizer}, but it was "
                f"{state['optimizer']} when the checkpoint was saved. Use the same optimiser."
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
                    f"Checkpoint: '{name}' has shape {tuple(tensor.shape)}, but it had shape "
                    f"{tuple(saved.shape)} when the checkpoint was saved. {_ADVICE}"
                )
        with torch.no_grad():
            for _, tensor, saved in pairs:
                tensor.copy_(saved)
        late = {name: x.requires_grad_() for name, x in saved_params.items() if name not in params}
        constraints = {name: state["constraints"][name] for name in late}
        pyro.get_param_store().set_state({"params": late, "constraints": constraints})
        # Pyro makes the optimisers again, from the states that wait for their parameters.
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


def _check_names(kind: str, wrong: set[str]) -> None:
    if wrong:
        raise ValueError(
            f"Checkpoint: the {kind}s {_listed(sorted(wrong))} are either in the file or in model "
            f"and guide, but not in both. {_ADVICE}"
        )


def _listed(names: Collection[str]) -> str:
    """Return the first names for an error message, and the number of the others."""
    text = ", ".join(f"'{name}'" for name in list(names)[:_MAX_NAMES])
    num_left = len(names) - _MAX_NAMES
    return f"{text} and {num_left} more" if num_left > 0 else text or "(none)"


def write(state: dict[str, Any], path: StrPath) -> None:
    """Write a state to a file. If writing fails, the old file stays as it was."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save({"format": _FORMAT, **state}, unfinished)
    unfinished.replace(path)


def read(path: StrPath) -> dict[str, Any]:
    """Load a file that :func:`write` saved. Only load files that you trust: they are pickles.

    :raises ValueError: if the file is not a checkpoint.
    :raises OSError: if the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        state = torch.load(io.BytesIO(data), weights_only=False)
    except Exception as error:
        raise ValueError(
            f"Checkpoint: {path} is not a checkpoint. Pass a file that was saved by run or save."
        ) from error
    if not (isinstance(state, dict) and state.get("format") == _FORMAT):
        raise ValueError(
            f"Checkpoint: {path} is not in the format '{_FORMAT}'. Pass a file that was saved by "
            "run or save."
        )
    return state
