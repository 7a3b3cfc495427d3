"""Checkpoints: the parameters, buffers and optimiser states of a training run, in a file."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.nn.parameter import is_lazy

from pyro_ext._files import StrPath, read_file, write_file
from pyro_ext._private.of_pyro import make_grad_clip, waiting_states
from pyro_ext._private.of_torch import buffers_of, parameters_of
from pyro_ext.infer.svi.capture.graph_inputs import current_params
from pyro_ext.infer.svi.capture.reachable_state import ReachableState
from pyro_ext.infer.svi.comparison import Comparison, as_text
from pyro_ext.infer.svi.optimizer_states import (
    make_optimizers,
    optimizer_states,
    packed,
    unpacked,
)
from pyro_ext.infer.svi.plain_constraints import decode, describe_constraint, encode, is_same
from pyro_ext.infer.svi.run_settings import module_local_params

_KIND = "pyro_ext training run"
_VERSION = 2  # version 1 was a pickle, without a version
_MAX_NAMES = 5  # in an error message


def write(state: dict[str, Any], path: StrPath) -> None:
    """Write a state to a file. If writing fails, the old file stays as it was.

    :raises TypeError: if the state has an object that a file cannot hold.
    :raises OSError: if the file cannot be written.
    """
    write_file(path, _KIND, _VERSION, state)


def read(path: StrPath) -> dict[str, Any]:
    """Load a file that :func:`write` saved.

    :raises ValueError: if the file is not a checkpoint, or is damaged.
    :raises OSError: if the file cannot be read.
    """
    try:
        return read_file(path, _KIND, _VERSION)
    except ValueError as error:
        raise ValueError(f"Checkpoint: {error}") from error


@contextmanager
def new_params_removed_on_error() -> Iterator[None]:
    """Remove the parameters that a block has added to the param store, if it fails."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except BaseException:
        for name in set(store.keys()) - before:
            del store[name]
        raise


@dataclass(frozen=True)
class ProgramState:
    """The parameters, buffers and optimiser states of a training run.

    :param reachable: the values that model and guide reach by name. It holds the parameters and
        buffers of modules.
    :param called: the modules that model and guide call, in the order of their first calls; None
        if no step has been taken.
    :param optim: the optimiser.
    """

    reachable: ReachableState
    called: Sequence[nn.Module] | None
    optim: PyroOptim

    def content(self) -> dict[str, Any]:
        """Return the state, to be written to a file at once. It shares the tensors' memory."""
        constraints = pyro.get_param_store().get_state()["constraints"]
        called = [(_kind(x), own) for x, own in self._tensors_of_called]
        self._check_that_all_have_labels()
        return {
            "module_local_params": module_local_params(),
            "params": current_params(),
            "constraints": {name: encode(x) for name, x in constraints.items()},
            "modules": self._in_modules,
            "called": None if self.called is None else called,
            "optimizer": packed(optimizer_states(self.optim, self._labels)),
        }

    def prepare(
        self, state: dict[str, Any], used: Iterable[str], comparison: Comparison
    ) -> Callable[[], None]:
        """Compare a state with that of now, and return a function that restores it in place.

        Model and guide must have run. Until the function is called, nothing changes.

        :param state: the result of :meth:`content`.
        :param used: the names of the parameters that model and guide use.
        :param comparison: takes the differences.
        """
        params, saved_params = current_params(), state["params"]
        self._compare_names(state, used, comparison)
        pairs = [
            (name, params[name], saved_params[name]) for name in params if name in saved_params
        ]
        values = self._compare_constraints(pairs, state, comparison)
        in_modules = self._pairs_of_modules(state)
        copies = _compare_tensors([*pairs, *in_modules], values, comparison)
        # A parameter that is not in the store yet may be one of a module.
        places = {_place(saved): tensor for _, tensor, saved in in_modules if saved.numel()}
        late = {
            name: places[_place(saved)] if _place(saved) in places else nn.Parameter(saved)
            for name, saved in saved_params.items()
            if name not in params
        }
        constraints = {name: _late_constraint(name, state, comparison) for name in late}

        states = unpacked(state["optimizer"])
        for name in values:  # moments in other coordinates
            if name in states:
                states[name] = _without_moments(states[name])
        by_name = {**self._by_label, **params, **late}

        def restore() -> None:
            made = make_optimizers(self.optim, states, by_name, comparison.overruled)
            with torch.no_grad():
                for tensor, saved in copies:
                    tensor.copy_(saved)
            pyro.get_param_store().set_state({"params": late, "constraints": constraints})
            self.optim.optim_objs.clear()
            self.optim.grad_clip.clear()
            waiting_states(self.optim).clear()
            self.optim.optim_objs.update(made)
            for param in made:
                self.optim.grad_clip[param] = make_grad_clip(self.optim, param)
            if "optimizer" not in comparison.overruled:
                waiting = {name: x for name, x in states.items() if name not in by_name}
                self.optim.set_state(waiting)

        return restore

    @cached_property
    def _in_modules(self) -> dict[str, Tensor]:
        found = self.reachable.state.items()
        return {label: x for label, x in found if isinstance(x, Tensor) and not is_lazy(x)}

    @cached_property
    def _tensors_of_called(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """The buffers of called modules, and their parameters that are nowhere else."""
        known = {id(x) for x in (*current_params().values(), *self._in_modules.values())}
        found = []
        for module in self.called or ():
            own = {key: x for key, x in buffers_of(module).items() if x is not None}
            for key, param in parameters_of(module).items():
                if param is not None and id(param) not in known and not is_lazy(param):
                    own[key] = param
            found.append((module, own))
        return found

    @cached_property
    def _by_label(self) -> dict[str, Tensor]:
        """The parameters in modules, which Pyro may not keep in the param store."""
        found = dict(self._in_modules)
        for i, (module, own) in enumerate(self._tensors_of_called):
            found |= {f"{i}: {_kind(module)}.{key}": x for key, x in own.items()}
        return found

    @cached_property
    def _labels(self) -> dict[int, str]:
        return {id(x): label for label, x in self._by_label.items()}

    def _check_that_all_have_labels(self) -> None:
        store = pyro.get_param_store()
        for param in self.optim.optim_objs if module_local_params() else ():
            if store.param_name(param) is None and id(param) not in self._labels:
                raise ValueError(
                    f"Checkpoint: a parameter of shape {tuple(param.shape)} is in a module that "
                    "neither model nor guide names or calls, so it cannot be saved. Use "
                    "pyro.settings.set(module_local_params=False)."
                )

    def _compare_names(
        self, state: dict[str, Any], used: Iterable[str], comparison: Comparison
    ) -> None:
        here = module_local_params()
        if here != state["module_local_params"]:
            comparison.refuse(
                f"The setting 'module_local_params' of Pyro is {here}, but it was "
                f"{not here}. Set it as it was, before you make the modules."
            )
            return
        in_store = current_params().keys()
        if state["called"] is not None:  # else the file may be older than the parameters
            new = set(used) & in_store - state["params"].keys()
            _refuse_names("parameters", new, comparison)
        _refuse_names("tensors", state["modules"].keys() ^ self._in_modules.keys(), comparison)
        if state["called"] is not None:
            kinds = [kind for kind, _ in state["called"]]
            found = [_kind(module) for module in self.called or ()]
            if kinds != found:
                comparison.refuse(
                    f"Model and guide call the modules {_listed(found)}, but they called "
                    f"{_listed(kinds)}."
                )

    def _pairs_of_modules(self, state: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        pairs = [
            (label, self._in_modules[label], saved)
            for label, saved in state["modules"].items()
            if label in self._in_modules
        ]
        for (module, own), (kind, saved) in zip(
            self._tensors_of_called, state["called"] or (), strict=False
        ):
            if _kind(module) == kind:
                pairs += [(f"{kind}.{key}", own[key], x) for key, x in saved.items() if key in own]
        return pairs

    def _compare_constraints(
        self, pairs: Any, state: dict[str, Any], comparison: Comparison
    ) -> dict[str, Tensor]:
        """Compare the constraints of parameters.

        :returns: the saved values under the constraints of now, for constraints that may differ.
        """
        values = {}
        constraints = pyro.get_param_store().get_state()["constraints"]
        for name, _, saved in pairs:
            now, before = encode(constraints[name]), state["constraints"][name]
            label = f"{name}.constraint"
            text, old_text = (as_text(describe_constraint(x)) for x in (now, before))
            comparison.compare(label, text, old_text, is_same(now, before))
            if label in comparison.overruled:
                values[name] = saved
                value = _under_constraint(saved, decode(before), constraints[name])
                if value is None:
                    comparison.refuse(f"The value of '{name}' cannot get the constraint {text}.")
                else:
                    values[name] = value
        return values


def _compare_tensors(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
    values: Mapping[str, Tensor],
    comparison: Comparison,
) -> list[tuple[Tensor, Tensor]]:
    """Compare shapes and dtypes, each tensor once, and return the tensors with their new values."""
    copies, seen = [], set()
    for name, tensor, before in pairs:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        saved = values.get(name, before)
        copies.append((tensor, saved))
        if tensor.shape != saved.shape:
            comparison.refuse(
                f"'{name}' has shape {tuple(tensor.shape)}, but it had shape {tuple(saved.shape)}."
            )
        comparison.compare(f"{name}.dtype", as_text(tensor.dtype), as_text(before.dtype))
    return copies


def _late_constraint(name: str, state: dict[str, Any], comparison: Comparison) -> Any:
    """Return the constraint of a parameter that only the file has."""
    encoded = state["constraints"][name]
    constraint = decode(encoded)
    if constraint is None:
        comparison.refuse(
            f"The parameter '{name}' does not exist yet, and a file does not hold its constraint "
            f"{encoded['name']}, which is not one of torch or Pyro. Create the parameter before "
            "you load the file, with the same pyro.param statement as in your program."
        )
    return constraint


def _under_constraint(saved: Tensor, old: Any, new: Any) -> Tensor | None:
    """Return the unconstrained tensor that has the same value under a new constraint."""
    if old is None:
        return None
    with torch.no_grad():
        value = transform_to(old)(saved)
        unconstrained = transform_to(new).inv(value)
        again = transform_to(new)(unconstrained)
    is_kept = again.shape == value.shape and torch.allclose(again, value, rtol=1e-3, atol=1e-6)
    return unconstrained if is_kept and bool(unconstrained.isfinite().all()) else None


def _place(saved: Tensor) -> tuple[int, torch.Size]:
    """Return the memory of a saved tensor. The same tensor has the same memory in the file."""
    return saved.data_ptr(), saved.shape


def _without_moments(state: dict[str, Any]) -> dict[str, Any]:
    if "scheduler" in state:
        return {**state, "optimizer": _without_moments(state["optimizer"])}
    return {**state, "state": {}}


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _refuse_names(kind: str, wrong: set[str], comparison: Comparison) -> None:
    if wrong:
        comparison.refuse(
            f"The {kind} {_listed(sorted(wrong))} are either in the file or in model and guide, "
            "but not in both."
        )


def _listed(names: Collection[str]) -> str:
    """Return the first names for an error message, and the number of the others."""
    text = ", ".join(f"'{name}'" for name in list(names)[:_MAX_NAMES])
    num_left = len(names) - _MAX_NAMES
    return f"{text} and {num_left} more" if num_left > 0 else text or "(none)"
