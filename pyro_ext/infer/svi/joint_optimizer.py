import inspect
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_ext._private.of_pyro import (
    load_optimizer_state,
    make_grad_clip,
    make_optimizer,
    waiting_states,
)
from pyro_ext._private.of_torch import mark_as_stepped


class JointOptimizer:
    """One optimiser for all parameters of a ``PyroOptim``, which has one for each parameter.

    Pyro's optimisers keep their states and learning rates. Schedulers, ``get_state``, ``save`` and
    ``load`` therefore work as usual. One fused or foreach optimiser steps all parameters with equal
    settings, and shares the states with Pyro's optimisers. If an optimiser has neither
    implementation, Pyro steps the parameters one by one.

    :param optim: the optimiser of an SVI.
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self._joint: Optimizer
        self._members: list[list[Optimizer]] = []
        #: The settings of all members, in order, that the joint optimiser has.
        self._known: list[dict[str, Any]] = []
        #: The parameters of the joint optimiser, with the states of Pyro's optimisers.
        self._states: dict[Tensor, Any] = {}

    def step(self, params: Sequence[Tensor], loss: Tensor | None = None) -> None:
        """Clip the gradients, and step the parameters that have one.

        :param params: the parameters.
        :param loss: a loss that has not been read. If it is not finite, a fused optimiser changes
            nothing, and any other optimiser gets gradients of zero.
        """
        is_bad = None if loss is None else ~loss.isfinite()
        if not self._can_join:
            _clear_gradients(params, is_bad)
            self.optim(list(params))
            return
        params = tuple(param for param in params if param.grad is not None)
        if not params:
            return
        for param in params:
            if param not in self.optim.optim_objs:
                self._make_optimizer(param)
            clip = self.optim.grad_clip.get(param)
            if clip is not None:
                clip(param)
        if not (self._is_of(params) and self._follow_settings()):
            self._join(params)
        joint: Any = self._joint
        if is_bad is not None and all(group.get("fused") for group in joint.param_groups):
            # A GradScaler skips a step in the same way.
            joint.grad_scale, joint.found_inf = None, is_bad.float()
            joint.step()
            del joint.grad_scale, joint.found_inf
        else:
            _clear_gradients(params, is_bad)
            joint.step()

    @cached_property
    def _can_join(self) -> bool:
        constructor: Any = self.optim.pt_optim_constructor
        return (
            type(self.optim) in (PyroOptim, PyroLRScheduler)
            and str(getattr(constructor, "__module__", "")).startswith("torch.optim")
            and "foreach" in inspect.signature(constructor).parameters
        )

    def _make_optimizer(self, param: Tensor) -> None:
        """Make the optimiser of a new parameter, in the same way as Pyro."""
        optim = self.optim
        if param.is_inference():
            name = pyro.get_param_store().param_name(param)
            raise RuntimeError(
                f"Parameter '{name}' was created in torch.inference_mode(), so it cannot be "
                "trained. Create it outside, or use torch.no_grad()."
            )
        own = optim.optim_objs[param] = make_optimizer(optim, param)
        optim.grad_clip[param] = make_grad_clip(optim, param)
        name = pyro.get_param_store().param_name(param)
        state = waiting_states(optim).pop(name, None)
        if state is not None:
            load_optimizer_state(own, state)

    def _is_of(self, params: tuple[Tensor, ...]) -> bool:
        """Return whether the joint optimiser has these parameters and their current states."""
        if len(params) != len(self._states):
            return False
        for param, (known, state) in zip(params, self._states.items(), strict=True):
            if param is not known or self._own_optimizer(param).state.get(param) is not state:
                return False
        return True

    def _own_optimizer(self, param: Tensor) -> Optimizer:
        own = self.optim.optim_objs[param]
        return getattr(own, "optimizer", own)

    def _join(self, params: tuple[Tensor, ...]) -> None:
        kinds: list[tuple[dict[str, Any], torch.device]] = []
        groups: list[dict[str, Any]] = []
        self._members = []
        for param in params:
            own = self._own_optimizer(param)
            kind = _settings(own), param.device
            if kind not in kinds:
                kinds.append(kind)
                groups.append({**_settings(own), "params": []})
                self._members.append([])
            groups[kinds.index(kind)]["params"].append(param)
            self._members[kinds.index(kind)].append(own)
        for group in groups:
            _choose_implementation(group)
        constructor: Any = self.optim.pt_optim_constructor
        self._joint = constructor(groups)
        self._known = [dict(own.param_groups[0]) for of_kind in self._members for own in of_kind]
        self._states = {}
        for param in params:
            own = self._own_optimizer(param)
            self._states[param] = self._joint.state[param] = own.state[param]
            mark_as_stepped(own)
        for group in self._joint.param_groups:
            if group.get("fused"):
                for param in group["params"]:
                    _move_step(self._states[param], param.device)

    def _follow_settings(self) -> bool:
        """Copy the current settings, such as learning rates.

        :returns: False if the settings of a group's members now differ.
        """
        members = [member for group in self._members for member in group]
        if all(
            member.param_groups[0] == known
            for member, known in zip(members, self._known, strict=True)
        ):
            return True
        for group, own in zip(self._joint.param_groups, self._members, strict=True):
            settings = _settings(own[0])
            if any(_settings(member) != settings for member in own[1:]):
                return False
            for key, value in settings.items():
                if key not in ("foreach", "fused"):
                    group[key] = value
        self._known = [dict(member.param_groups[0]) for member in members]
        return True


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def _choose_implementation(group: dict[str, Any]) -> None:
    """Select the fused or foreach implementation, unless the user has chosen one."""
    if group.get("foreach") is not None or group.get("fused") is not None:
        return
    if group.get("differentiable") or group.get("capturable"):
        return
    if any(isinstance(x, Tensor) for x in (group["lr"], *group.get("betas", ()))):
        return
    # Fused SGD fails if only some of the parameters have momentum, so SGD is never fused.
    can_be_fused = {"fused", "betas"} <= group.keys() and all(
        param.device.type in ("cpu", "cuda") and param.is_floating_point()
        for param in group["params"]
    )
    group["fused" if can_be_fused else "foreach"] = True


def _move_step(state: dict[str, Any], device: torch.device) -> None:
    """Move the number of steps to the device on which a fused optimiser reads it."""
    if isinstance(state.get("step"), Tensor):
        state["step"] = state["step"].to(device)


def _clear_gradients(params: Iterable[Tensor], where: Tensor | None) -> None:
    """Replace gradients by zero if a condition on the device holds."""
    for param in params:
        if param.grad is not None and where is not None:
            param.grad.masked_fill_(where.to(param.device), 0)
