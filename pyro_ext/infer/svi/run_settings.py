"""The settings of a training run as plain values, by name, to be compared with a checkpoint."""

import inspect
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import pyro
from pyro.infer.elbo import ELBO
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor, nn

from pyro_ext.infer.kl.schedules import KLSchedule
from pyro_ext.infer.svi.comparison import as_text
from pyro_ext.infer.svi.optimizer_states import optimizer_arguments

_NUMBERS = (bool, int, float, complex, str, bytes)
_MAX_ITEMS, _MAX_DEPTH = 1000, 5
_ELBO_LIKE = (ELBO, KLSchedule)
#: Attributes of objectives that change by themselves, or that do not change results.
_LEFT_OUT = {
    "ignore_jit_warnings",
    "is_in_use",
    "jit_options",
    "max_plate_nesting",
    "num_steps_taken",
    "retain_graph",
    "strict_enumeration_warning",
}


def optimizer_settings(optim: PyroOptim, params: Iterable[str]) -> dict[str, Any]:
    """Return the class of an optimiser and the settings that the user has passed.

    :param optim: the optimiser.
    :param params: the names of the parameters, for settings that a function of the name returns.
    """
    found: dict[str, Any] = {"optimizer": _name_of(optim.pt_optim_constructor)}
    if callable(optim.pt_optim_args):
        found["optimizer.optim_args"] = _name_of(optim.pt_optim_args)
        for name in params:
            for key, value in optimizer_arguments(optim, name).items():
                found[f"optimizer.{key}[{name}]"] = _plain(value)
    else:
        found |= {f"optimizer.{key}": _plain(x) for key, x in optim.pt_optim_args.items()}
    if callable(optim.pt_clip_args):
        found["optimizer.clip_args"] = _name_of(optim.pt_clip_args)
    else:
        found |= {f"optimizer.{key}": _plain(x) for key, x in optim.pt_clip_args.items()}
    found["scheduler"] = None
    if isinstance(optim, PyroLRScheduler):
        found["scheduler"] = _name_of(optim.pt_scheduler_constructor)
        found |= {f"scheduler.{key}": _plain(x) for key, x in optim.kwargs.items()}
    return found


def defaults_of(
    optim: PyroOptim, now: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of settings of the optimiser that one of two runs has not passed.

    :param optim: the optimiser.
    :param now: the settings of the one run.
    :param before: the settings of the other run.
    """
    names = [name for name in {**now, **before} if _is_argument(name)]
    found: dict[str, Any] = dict.fromkeys(names, as_text("not set"))
    found |= _defaults("optimizer", optim.pt_optim_constructor)
    if isinstance(optim, PyroLRScheduler):
        found |= _defaults("scheduler", optim.pt_scheduler_constructor)
    functions = [bool(settings.get("optimizer.optim_args")) for settings in (now, before)]
    if functions[0] != functions[1]:  # then only this is compared
        found = {name: x for name, x in found.items() if not name.startswith("optimizer.")}
    options = ("optim_args", "clip_args", "clip_norm", "clip_value")
    return found | {f"optimizer.{key}": None for key in options}


def _is_argument(name: str) -> bool:
    return name.startswith(("optimizer.", "scheduler.")) and "[" not in name


def objective_settings(objective: Any, name: str = "objective") -> dict[str, Any]:
    """Return the class and the plain attributes of an objective, and of those inside of it.

    :param objective: an ELBO, a KL schedule or a loss function.
    :param name: its name in the names of the settings.
    """
    owner = getattr(objective, "__self__", None)
    if isinstance(owner, _ELBO_LIKE):
        return objective_settings(owner, name) | {name: _name_of(objective)}
    if not isinstance(objective, _ELBO_LIKE):
        return {name: _name_of(objective)}
    found: dict[str, Any] = {name: _name_of(type(objective))}
    left_out = set(_LEFT_OUT)
    if isinstance(objective, KLSchedule):
        left_out |= objective.state_dict().keys()
    for key, value in vars(objective).items():
        if isinstance(value, _ELBO_LIKE) and name.count(".") < _MAX_DEPTH:
            found |= objective_settings(value, f"{name}.{key.lstrip('_')}")
        elif key not in left_out and not key.startswith("_") and _is_comparable(value):
            found[f"{name}.{key}"] = _plain(value)
    return found


def module_local_params() -> bool:
    """Return whether Pyro keeps parameters in modules, and not in the param store."""
    return bool(pyro.settings.get("module_local_params"))


def _defaults(name: str, constructor: Any) -> dict[str, Any]:
    try:
        parameters = inspect.signature(constructor).parameters.values()
    except (TypeError, ValueError):  # a class without a signature
        return {}
    known = {x.name: x.default for x in parameters if x.default is not inspect.Parameter.empty}
    return {f"{name}.{key}": _plain(value) for key, value in known.items()}


def _is_comparable(value: Any) -> bool:
    """Return whether the value of an attribute is a setting, and not a part of the state."""
    if isinstance(value, (list, tuple, Set)):
        return len(value) <= _MAX_ITEMS and all(isinstance(x, _NUMBERS) for x in value)
    is_function = callable(value) and not isinstance(value, nn.Module)
    return value is None or isinstance(value, (*_NUMBERS, np.generic)) or is_function


def _plain(value: Any) -> Any:
    if value is None:
        return None
    kind: Any
    for kind in _NUMBERS:
        if isinstance(value, kind):  # also an enumeration, of which a file holds the number
            return kind(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, Set):
        return sorted((_plain(x) for x in value), key=repr)
    return _name_of(value)


def _name_of(value: Any) -> str:
    """Return the name of a class or function, or of the class of another object.

    A function is followed by the plain values in its closure and defaults.
    """
    if isinstance(value, partial):
        given = [*map(_plain, value.args), *sorted(value.keywords)]
        given += [_plain(value.keywords[key]) for key in sorted(value.keywords)]
        return f"partial of {_name_of(value.func)} with {given}"
    if isinstance(value, FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                cells.append(cell.cell_contents)
        constants = value.__code__.co_consts if value.__name__ == "<lambda>" else ()
        used = [*constants, *cells, *(value.__defaults__ or ())]
        numbers = [x for x in used if isinstance(x, _NUMBERS)]
        return f"{value.__qualname__} with {numbers}" if numbers else value.__qualname__
    has_name = isinstance(value, (type, MethodType, BuiltinFunctionType))
    return str(value.__qualname__ if has_name else type(value).__qualname__)
