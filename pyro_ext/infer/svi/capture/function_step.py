"""A step that returns the results of a function of model and guide."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext.infer.svi.capture.graph_inputs import Arguments, params_kept_in_place
from pyro_ext.infer.svi.capture.operation_log import Outcome
from pyro_ext.infer.svi.capture.step import Outputs, Step
from pyro_ext.infer.svi.capture.value_checks import without_looking_at_values
from pyro_ext.tracing import Programs


class Values(NamedTuple):
    """The results of a function: a tensor, and perhaps its gradients in arguments, by name."""

    value: Tensor
    gradients: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor | None]:
        """All results, in the order in which a graph returns them."""
        return [self.value, *self.gradients.values()]


@dataclass(eq=False)
class FunctionStep(Step):
    """A step without gradients of parameters, whose objective returns :class:`Values`.

    The objective is a function of model, guide and the arguments.
    """

    @staticmethod
    def of(objective: object, programs: Programs) -> "FunctionStep":
        """Return the step of a function, inside of the present effect handlers."""
        return FunctionStep(objective, programs.model, programs.guide, False, tuple(HANDLER_STACK))

    def refusal(self) -> str | None:
        """Return why no graph can take this step: there is no such reason."""
        return None

    def compute(self, arguments: Arguments) -> Outcome:
        """Compute the results without reading the value of any tensor."""
        torch.clear_autocast_cache()  # the cache may hold casts of earlier parameters
        with without_looking_at_values(), params_kept_in_place(), torch.no_grad():
            with poutine.trace(param_only=True) as trace:
                found: Values = self.evaluate(self.objective, arguments)
            gradients: dict[str, Tensor | None] = {**found.gradients}
            return Outcome(found.value, gradients, self.used_params(trace.trace))

    def run_eagerly(self, arguments: Arguments, names: Sequence[str]) -> Outputs:
        """Compute the results without a graph."""
        with torch.no_grad(), params_kept_in_place(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Values = self.evaluate(self.objective, arguments)
        return found.tensors
