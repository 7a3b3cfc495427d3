import inspect
from collections.abc import Sequence
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
    """Steps all parameters of a ``PyroOptim`` at once, where Pyro has an optimiser for each.

    The optimisers of Pyro stay as they are, with their states and learning rates, so that
    schedulers, ``get_state``, ``save`` and ``load`` work as ever; parameters with equal settings
    are stepped by one fused (CPU) or foreach (CUDA) optimiser that shares those states.
    Optimisers that have neither are left to Pyro.

    :param PyroOptim optim: the optimiser of an SVI.
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self._joint: Optimizer
        self._members: list[list[Optimizer]] = []
        #: The parameters that were joined, with the states of their optimisers.
        self._states: dict[Tensor, Any] = {}

    def step(self, params: Sequence[Tensor]) -> None:
        """Clips and steps the parameters that have gradients."""
        if not self._can_join:
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
        self._joint.step()

    @cached_property
    def _can_join(self) -> bool:
        constructor: Any = self.optim.pt_optim_constructor
        return (
            type(self.optim) in (PyroOptim, PyroLRScheduler)
            and str(getattr(constructor, "__module__", "")).startswith("torch.optim")
            and "foreach" in inspect.signature(constructor).parameters
        )

    def _make_optimizer(self, param: Tensor) -> None:
        """What Pyro does when it first sees a parameter."""
        optim = self.optim
        own = optim.optim_objs[param] = make_optimizer(optim, param)
        optim.grad_clip[param] = make_grad_clip(optim, param)
        name = pyro.get_param_store().param_name(param)
        state = waiting_states(optim).pop(name, None)
        if state is not None:
            load_optimizer_state(own, state)

    def _is_of(self, params: tuple[Tensor, ...]) -> bool:
        """Whether it was made for these parameters, and for the states that they have now."""
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
        self._states = {}
        for param in params:
            own = self._own_optimizer(param)
            self._states[param] = self._joint.state[param] = own.state[param]
            mark_as_stepped(own)

    def _follow_settings(self) -> bool:
        """Takes over learning rates and the like; False if members no longer agree."""
        for group, members in zip(self._joint.param_groups, self._members, strict=True):
            settings = _settings(members[0])
            if any(_settings(member) != settings for member in members[1:]):
                return False
            for key, value in settings.items():
                if key not in ("foreach", "fused"):
                    group[key] = value
        return True


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def _choose_implementation(group: dict[str, Any]) -> None:
    """Asks for the fused or the foreach implementation where the user left it open."""
    if group.get("foreach") is not None or group.get("fused") is not None:
        return
    if group.get("differentiable") or group.get("capturable"):
        return
    if any(isinstance(x, Tensor) for x in (group["lr"], *group.get("betas", ()))):
        return
    # Fused SGD does not take parameters of which some have momentum.
    can_be_fused = {"fused", "betas"} <= group.keys() and all(
        param.device.type == "cpu" and param.is_floating_point() for param in group["params"]
    )
    group["fused" if can_be_fused else "foreach"] = True
