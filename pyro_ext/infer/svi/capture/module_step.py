"""A step of a training loop that calls ``backward`` on a loss of its own."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ext._private.of_torch import without_gradient_hooks
from pyro_ext.infer.svi.capture.graph_inputs import Arguments, current_params, params_of
from pyro_ext.infer.svi.capture.step import Outputs, Step, as_tensor, without_autocast


@dataclass(eq=False)
class ModuleStep(Step):
    """A step with gradients of the parameters in the param store and in a module.

    :param module: the module.
    """

    module: nn.Module

    takes_local_params: ClassVar[bool] = True

    def params(self) -> dict[str, Tensor]:
        """Return the parameters in the param store and in the module, by name."""
        return {**self._of_module(), **current_params()}

    def used_params(self, trace: Any) -> dict[str, Tensor]:
        """Return the parameters in a trace, and then those of the module."""
        known = self.params()
        used = {**self._of_module(), **params_of(trace)}
        return {name: used[name] for name in used if known.get(name) is used[name]}

    def _of_module(self) -> dict[str, Tensor]:
        return {f"module.{name}": param for name, param in self.module.named_parameters()}

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
