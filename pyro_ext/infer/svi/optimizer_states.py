"""The states of Pyro's optimisers: as plain values, and as optimisers that continue from them."""

import copy
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.optim import is_scheduler
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_ext._files import to_plain
from pyro_ext._private.of_pyro import load_optimizer_state, waiting_states
from pyro_ext._private.of_torch import mark_as_stepped

_COUNTER = "Counter"
#: What a ``ReduceLROnPlateau`` has seen of the losses.
_SEEN = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


def optimizer_states(optim: PyroOptim, labels: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return the states of a ``PyroOptim``, also those that wait for their parameters.

    :param optim: the optimiser.
    :param labels: names of parameters outside of the param store, by identity.
    """
    store = pyro.get_param_store()
    states = {name: x for name, x in waiting_states(optim).items() if name is not None}
    for param, own in optim.optim_objs.items():
        name = store.param_name(param) or (labels or {}).get(id(param))
        if name is not None:
            states[name] = _state_of(own)
    return states


def packed(states: Any) -> Any:
    """Return states that a file can hold. Schedulers keep milestones in a ``Counter``."""
    if isinstance(states, Counter):
        return {_COUNTER: dict(states)}
    if isinstance(states, Mapping):
        return {key: packed(x) for key, x in states.items()}
    return type(states)(map(packed, states)) if type(states) in (list, tuple) else states


def unpacked(states: Any) -> Any:
    """Return the states that were packed."""
    if isinstance(states, dict):
        if states.keys() == {_COUNTER}:
            return Counter(states[_COUNTER])
        return {key: unpacked(x) for key, x in states.items()}
    return type(states)(map(unpacked, states)) if type(states) in (list, tuple) else states


def check_states(optim: PyroOptim) -> None:
    """Raise an error if a file cannot hold the states of an optimiser.

    Before the first step there are no states, so a trial optimiser takes a step.

    :raises TypeError: if a state has an object that a file cannot hold. It names where.
    """
    states = optimizer_states(optim)
    if not states and not callable(optim.pt_optim_args):  # a function may know its names only
        trial = torch.zeros(2, 2, requires_grad=True)
        trial.grad = torch.zeros(2, 2)
        try:
            own = _make(optim, "trial", trial)
            _torch_optimizer(own).step()
            states = {"trial": _state_of(own)}
        except Exception:  # it does not take such a parameter, and the first step will show
            return
    to_plain(packed(states), "The state of the optimizer, states")


def make_optimizers(
    optim: PyroOptim,
    states: Mapping[str, Any],
    params: Mapping[str, Tensor],
    overruled: Collection[str],
) -> dict[Tensor, Any]:
    """Make the torch optimisers that continue from states.

    :param optim: the optimiser.
    :param states: the states by the names of the parameters.
    :param params: the parameters by name. States of other parameters are ignored.
    :param overruled: the names of settings that have changed since the states were saved.
    :raises ValueError: if the states do not fit the settings.
    """
    made: dict[Tensor, Any] = {}
    if "optimizer" in overruled:
        return made
    replayed: dict[tuple[str, int], Any] = {}
    for name in [name for name in states if name in params]:
        own = made[params[name]] = _make(optim, name, params[name])
        changed = {
            key
            for key in _torch_optimizer(own).param_groups[0].keys() - {"params"}
            if {f"optimizer.{key}", f"optimizer.{key}[{name}]", "optimizer.optim_args"}
            & set(overruled)
        }
        group = name if callable(optim.pt_optim_args) else ""  # of parameters with equal settings
        try:
            state = _continued(states[name], own, changed, overruled, replayed, group)
            load_optimizer_state(own, state)
        except Exception as error:
            raise ValueError(
                f"Checkpoint: the optimizer cannot continue from the state of '{name}': {error}"
            ) from error
        if is_scheduler(own):
            mark_as_stepped(own.optimizer)
    return made


def optimizer_arguments(optim: PyroOptim, name: str) -> dict[str, Any]:
    """Return the arguments with which Pyro makes the torch optimiser of a parameter."""
    arguments: Any = optim.pt_optim_args
    if not callable(arguments):
        return dict(arguments)
    if optim.pt_optim_args_argc == 1:
        return dict(arguments(normalize_param_name(name)))
    return dict(arguments(module_from_param_with_module_name(name), user_param_name(name)))


def _make(optim: PyroOptim, name: str, param: Tensor) -> Any:
    constructor: Any = optim.pt_optim_constructor
    own = constructor([param], **optimizer_arguments(optim, name))
    if isinstance(optim, PyroLRScheduler):
        return optim.pt_scheduler_constructor(own, **optim.kwargs)
    return own


def _torch_optimizer(own: Any) -> Any:
    return own.optimizer if is_scheduler(own) else own


def _state_of(own: Any) -> dict[str, Any]:
    state: dict[str, Any] = _torch_optimizer(own).state_dict()
    return {"scheduler": own.state_dict(), "optimizer": state} if is_scheduler(own) else state


def _continued(
    saved: dict[str, Any],
    own: Any,
    changed: set[str],
    overruled: Collection[str],
    replayed: dict[tuple[str, int], Any],
    group: str,
) -> dict[str, Any]:
    """Return a saved state with the settings of now in place of those that were overruled.

    :param saved: the state.
    :param own: the new torch optimiser or scheduler.
    :param changed: the overruled settings of the torch optimiser.
    :param overruled: the names of all overruled settings.
    :param replayed: what a scheduler with new settings arrives at, by group.
    :param group: the group of parameters with the same settings.
    """
    is_new = "scheduler" in overruled
    is_changed = any(name.startswith("scheduler.") for name in overruled)
    state = saved["optimizer"] if "scheduler" in saved else saved
    fresh = _state_of(own)
    if not is_scheduler(own):
        return _with_groups(state, fresh if is_new else _changed(state, fresh, changed))
    if is_new:
        return {**fresh, "optimizer": _with_groups(state, fresh["optimizer"])}
    if not changed and not is_changed:
        return saved
    if isinstance(own, ReduceLROnPlateau):
        seen = _SEEN if "scheduler.mode" not in overruled else _SEEN[-1:]
        scheduler = saved["scheduler"]
        if is_changed:
            scheduler = fresh["scheduler"] | {key: scheduler[key] for key in seen}
        groups = _changed(state, fresh["optimizer"], changed)
        return {"scheduler": scheduler, "optimizer": _with_groups(state, groups)}
    num_steps = saved["scheduler"]["last_epoch"]  # fewer for a parameter that came late
    if (group, num_steps) not in replayed:
        replayed[group, num_steps] = _replay(own, num_steps)
    new = copy.deepcopy(replayed[group, num_steps])
    return {**new, "optimizer": _with_groups(state, new["optimizer"])}


def _replay(own: Any, num_steps: int) -> dict[str, Any]:
    """Return the state of a scheduler after some steps."""
    mark_as_stepped(own.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(num_steps):
            own.step()
    return _state_of(own)


def _with_groups(state: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    return {"state": state["state"], "param_groups": groups["param_groups"]}


def _changed(state: dict[str, Any], fresh: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """Return the settings of a state, with those of now at some keys."""
    (old,), (new,) = state["param_groups"], fresh["param_groups"]
    return {"param_groups": [old | {key: new[key] for key in keys}]}
