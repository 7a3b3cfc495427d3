"""The state of a training run: parameters, buffers and optimisers, and its file."""

import io
import os
from collections.abc import Iterable, Sequence
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


def optimizer_state(optim: PyroOptim) -> dict[str, Any]:
    """The states of a ``PyroOptim``, with those that wait for their parameters."""
    return {**waiting_states(optim), **optim.get_state()}


def program_state(
    around: ReachableState, called: Sequence[nn.Module], optim: PyroOptim
) -> dict[str, Any]:
    """Parameters, buffers and optimisers.

    :param ReachableState around: what the programs reach, for parameters and buffers of modules.
    :param called: the modules that the programs call, in this order.
    :param PyroOptim optim: the optimiser.
    """
    return {
        "params": _copies(current_params()),
        "constraints": pyro.get_param_store().get_state()["constraints"],
        "modules": _copies(around.state),
        "called": [(type(module).__name__, _copies(buffers_of(module))) for module in called],
        "optim": optimizer_state(optim),
        "optimizer": _name(optim.pt_optim_constructor),
    }


def load_program_state(
    state: dict[str, Any],
    around: ReachableState,
    called: Sequence[nn.Module],
    used: Iterable[str],
    optim: PyroOptim,
) -> None:
    """Restores what :func:`program_state` returned, in place, once the programs have run.

    :param dict state: what was returned.
    :param around: as there, as are ``called`` and ``optim``.
    :param used: the names of the parameters that the programs use.
    :raises ValueError: if the programs or the optimiser are others; nothing is changed then.
    """
    params, in_modules = current_params(), around.state
    _check_names("parameter", set(used) - state["params"].keys(), state["params"])
    _check_names("tensor", state["modules"].keys() ^ in_modules.keys(), in_modules)
    kinds = [kind for kind, _ in state["called"]]
    if kinds != [type(module).__name__ for module in called]:
        raise ValueError(
            f"Checkpoint: expected programs that call the modules {kinds}, got "
            f"{[type(module).__name__ for module in called]}."
        )
    if state["optimizer"] != _name(optim.pt_optim_constructor):
        raise ValueError(
            f"Checkpoint: expected the optimiser {state['optimizer']}, got "
            f"{_name(optim.pt_optim_constructor)}."
        )
    pairs = [(label, in_modules[label], saved) for label, saved in state["modules"].items()]
    pairs += [
        (f"{kind}.{name}", module.get_buffer(name), saved)
        for module, (kind, buffers) in zip(called, state["called"], strict=True)
        for name, saved in buffers.items()
    ]
    pairs += [
        (name, params[name], saved) for name, saved in state["params"].items() if name in params
    ]
    for name, tensor, saved in pairs:
        if tensor.shape != saved.shape:
            raise ValueError(
                f"Checkpoint: '{name}' has shape {tuple(saved.shape)} there and "
                f"{tuple(tensor.shape)} in the programs: expected the same."
            )
    with torch.no_grad():
        for _, tensor, saved in pairs:
            tensor.copy_(saved)
    late = {name: x.requires_grad_() for name, x in state["params"].items() if name not in params}
    constraints = {name: state["constraints"][name] for name in late}
    pyro.get_param_store().set_state({"params": late, "constraints": constraints})
    # Pyro makes the optimisers anew, with the states that are waiting for them.
    optim.optim_objs.clear()
    waiting_states(optim).clear()
    optim.set_state(state["optim"])


def _copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items() if x is not None}


def _name(constructor: Any) -> str:
    return str(getattr(constructor, "__name__", constructor))


def _check_names(kind: str, wrong: set[str], expected: Iterable[str]) -> None:
    if wrong:
        raise ValueError(
            f"Checkpoint: expected the model and guide that it was saved with, whose {kind}s are "
            f"{sorted(expected)}; {sorted(wrong)} are on one side only."
        )


def write(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Saves a state to a file, which is the old one or the new one whatever happens."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save({"format": _FORMAT, **state}, unfinished)
    unfinished.replace(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
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
