"""A step of a training loop that calls ``backward`` on a loss of its own."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ext._private.of_torch import parameters_of, without_gradient_hooks
from pyro_ext.infer.svi.capture.graph_inputs import Arguments, OwnParams, params_of, read_params
from pyro_ext.infer.svi.capture.recorder import GraphRecorder
from pyro_ext.infer.svi.capture.step import (
    Outputs,
    Step,
    as_tensor,
    autocast_devices,
    without_autocast,
)


@dataclass(eq=False)
class ModuleStep(Step):
    """A step with gradients of the parameters in the param store and in a module.

    :param module: the module.
    """

    module: nn.Module

    def refusal(self) -> str | None:
        """Return why no graph can take this step, or None."""
        halves = (torch.get_autocast_dtype(x) is torch.float16 for x in autocast_devices())
        if not (self.has_gradients and any(halves)):
            return None
        return (
            "under autocast to float16, the loss must be scaled before its gradients are computed, "
            "and a graph computes them first. Use bfloat16"
        )

    def keeps(self, value: Any, recorder: GraphRecorder) -> bool:
        """Return whether a graph can leave a value where the programs leave it.

        A loop may differentiate it, which a result of a graph does not allow.
        """
        if self.has_gradients and getattr(value, "requires_grad", False):
            return False
        return super().keeps(value, recorder)

    def own_params(self) -> OwnParams:
        """Return the places of the parameters of the module, by name."""
        return {
            f"module.{name}.{key}": (parameters_of(part), key)
            for name, part in self.module.named_modules()
            for key, param in parameters_of(part).items()
            if param is not None
        }

    def used_params(self, trace: Any) -> dict[str, Tensor]:
        """Return the parameters in a trace, and those of the module."""
        known = self.params()
        used = {**read_params(self.own_params()), **params_of(trace)}
        return {name: used[name] for name in used if known.get(name) is used[name]}

    def differentiate(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool = False
    ) -> Sequence[Tensor | None]:
        """Return the gradients that a later call of ``backward`` gives to its hooks."""
        with without_autocast(), without_gradient_hooks(params):
            return super().differentiate(loss, params, retain_graph)

    def run_eagerly(self, arguments: Arguments, names: Sequence[str]) -> Outputs:
        """Compute the loss and the gradients of the named parameters, with no effect on them."""
        params = self.params()
        with torch.set_grad_enabled(self.has_gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = as_tensor(self.evaluate(self.objective.differentiable_loss, arguments))
            gradients = self.gradients(loss, {name: params[name] for name in names})
        return [loss, *gradients.values()]
