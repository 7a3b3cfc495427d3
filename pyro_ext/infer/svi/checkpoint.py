"""The state of a training run: parameters, buffers, optimisers, random numbers."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim

from pyro_ext.infer.svi.guards import Surroundings, current_params
from pyro_ext.ops.random_state import get_random_state, set_random_state


def random_states() -> dict[str, Any]:
    """The states of the generators of torch, Python and NumPy."""
    return {
        "torch": get_random_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restores what :func:`random_states` returned."""
    set_random_state(states["torch"])
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])


def program_state(around: Surroundings, optim: PyroOptim) -> dict[str, Any]:
    """Parameters, buffers and optimisers.

    :param Surroundings around: what the programs reach, for parameters and buffers of modules.
    """
    params = current_params()
    in_modules = around.state
    label_of = {id(tensor): label for label, tensor in in_modules.items()}
    return {
        "params": {name: param.detach().clone() for name, param in params.items()},
        "constraints": pyro.get_param_store().get_state()["constraints"],
        "modules": {label: tensor.detach().clone() for label, tensor in in_modules.items()},
        "labels": {name: label_of[id(p)] for name, p in params.items() if id(p) in label_of},
        "optim": optim.get_state(),
    }


def load_program_state(state: dict[str, Any], around: Surroundings, optim: PyroOptim) -> None:
    """Restores what :func:`program_state` returned, in place where there is a tensor.

    :raises ValueError: if the programs have no such parameters or buffers, or of another shape.
    """
    params, in_modules = current_params(), around.state
    labels_of_params = set(state["labels"].values())
    for label in state["modules"].keys() - in_modules.keys() - labels_of_params:
        raise ValueError(
            f"Checkpoint: it has '{label}', which the programs do not have: expected the model "
            f"and guide that it was saved with; got {sorted(in_modules)}."
        )
    pairs = [
        (label, in_modules[label], saved)
        for label, saved in state["modules"].items()
        if label in in_modules
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
    # A parameter of a module gets into the store when the module runs.
    new = {
        name: saved.requires_grad_()
        for name, saved in state["params"].items()
        if name not in params and state["labels"].get(name) not in in_modules
    }
    constraints = {name: state["constraints"][name] for name in new}
    pyro.get_param_store().set_state({"params": new, "constraints": constraints})
    # Pyro makes the optimisers anew, with the states that are waiting for them.
    optim.optim_objs.clear()
    optim.set_state(state["optim"])


def write(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Saves a state to a file, which is the old one or the new one whatever happens."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads what :func:`write` saved; from a file that is trusted, for it is a pickle."""
    return torch.load(path, weights_only=False)
