import math
from functools import partial
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_ext._arguments import describe
from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext._private.of_torch import gathered, outside_of_dynamo
from pyro_ext.infer.kl.kl_weighted import KLWeightedELBO
from pyro_ext.infer.svi.capture.front import Front, Settings, held_level
from pyro_ext.infer.svi.capture.graphs import ReadyGraph
from pyro_ext.infer.svi.capture.loss_with_gradients import loss_with_gradients
from pyro_ext.infer.svi.capture.module_step import ModuleStep
from pyro_ext.tracing import Program
from pyro_ext.tracing.arguments import check_program


class CompiledELBO(Protocol):
    """A function that makes a module from a model and a guide."""

    def __call__(self, model: Program, guide: Program) -> "CompiledELBOModule": ...


def compile_elbo(
    elbo: ELBO,
    backend: str = "inductor",
    mode: str = "default",
    fallback: bool = True,
    max_graphs: int = 8,
    compile_after: int = 0,
    audit_every: int = 5000,
) -> CompiledELBO:
    """Compile an ELBO for a training loop of your own.

    ``compile_elbo(elbo)(model, guide)`` is a module like Pyro's ``elbo(model, guide)``. It has the
    parameters of model and guide. Call it with the arguments of both. It returns the loss as a
    scalar tensor, and ``backward`` adds the gradients to ``.grad`` of the parameters. The first
    call runs the programs. Later calls run a graph of the loss and its gradients, under the
    contract of :class:`CompiledSVI`. A call computes the loss and the gradients, and ``backward``
    multiplies the gradients by that of the loss.

    Audits happen in a call. The module then runs the graph and ``elbo.differentiable_loss`` on the
    same noise and state, and compares loss and gradients. At the end of your loop, call the
    module's method ``audit()``. Steps are counted in calls.

    Gradients arrive in the parameters of the module and of the param store. If a tensor elsewhere
    requires gradients, or an argument does, the module takes eager steps. One warning gives the
    reason. A step with second derivatives of the loss raises a ``NotImplementedError``.

    You can wrap the module in ``DistributedDataParallel`` or ``fully_shard``. If ``fully_shard``
    has wrapped layers in it, the module takes eager steps.

    :param elbo: an ELBO with a ``differentiable_loss``. All ELBOs of this package have one, and so
        have Pyro's ``Trace_ELBO``, ``TraceMeanField_ELBO`` and ``TraceEnum_ELBO``.
    :param backend: see :class:`CompiledSVI`, as for the arguments below.
    :param mode: a mode of ``torch.compile`` for Inductor.
    :param fallback: whether to take eager steps, with a warning, if there is no graph.
    :param max_graphs: the largest number of graphs, >= 1.
    :param compile_after: the number of eager calls, >= 0, before arguments of the same shapes and
        values get a graph.
    :param audit_every: the largest number of steps of a graph from one audit to the next, >= 1.
    :returns: a function of model and guide that returns the module.
    :raises TypeError: if ``elbo`` is not an ELBO with a ``differentiable_loss``, if model or guide
        is not a program, or if ``max_graphs``, ``compile_after`` or ``audit_every`` is not an
        integer.
    :raises ValueError: if an argument is out of range.
    :raises RuntimeError: in a call, if the step cannot be captured or an audit fails, and
        ``fallback`` is False.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_ext.infer import ImportanceWeightedELBO
    >>> pyro.set_rng_seed(0)
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
    >>> loss = compile_elbo(ImportanceWeightedELBO(8), backend="eager")(model, AutoNormal(model))
    >>> _ = loss()  # creates the parameters of the guide
    >>> optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     loss().backward()
    ...     optimizer.step()
    >>> abs(loss.guide.median()["z"].item() - 1.0) < 0.3
    True
    """
    settings = Settings.checked(
        "compile_elbo", backend, mode, fallback, max_graphs, compile_after, audit_every
    )
    if isinstance(elbo, type):
        raise TypeError(
            f"compile_elbo: elbo is the class {elbo.__name__}. Pass an instance of it, such as "
            f"{elbo.__name__}()."
        )
    if not isinstance(elbo, ELBO):
        raise TypeError(
            f"compile_elbo: elbo must be an ELBO, but it is {describe(elbo)}. Pass the ELBO here, "
            "and model and guide to the result: compile_elbo(elbo)(model, guide)."
        )
    if not hasattr(elbo, "differentiable_loss"):
        raise TypeError(
            f"compile_elbo: {type(elbo).__name__} has no differentiable_loss. Pass an ELBO of "
            "pyro_ext, Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO."
        )
    return partial(CompiledELBOModule, elbo=elbo, settings=settings)


class CompiledELBOModule(Front, ELBOModule):
    """The loss of a model and guide, as a module whose calls run compiled graphs.

    :func:`compile_elbo` makes it.
    """

    _front = "compile_elbo"

    def __init__(self, model: Program, guide: Program, elbo: ELBO, settings: Settings) -> None:
        check_program(self._front, "model", model)
        check_program(self._front, "guide", guide)
        super().__init__(model, guide, elbo)  # type: ignore[arg-type]  # functions, too
        self._set_up(settings)
        self._has_run = False

    def __getstate__(self) -> dict[str, Any]:
        # Pyro attaches weak references to parameters, and these cannot be pickled.
        for param in self.parameters():
            vars(param).pop("unconstrained", None)
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._has_run = False

    @outside_of_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss.

        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: a scalar tensor, in nats.
        :raises RuntimeError: as for :func:`compile_elbo`.
        """
        has_gradients = torch.is_grad_enabled()
        # Parameters that are created in inference mode could never be trained.
        with (
            held_level(self.elbo),
            torch.inference_mode(False),
            torch.set_grad_enabled(has_gradients),
        ):
            handlers = tuple(HANDLER_STACK)
            step = ModuleStep(self.elbo, self.model, self.guide, has_gradients, handlers, self)
            # In a first run, programs create parameters, and ELBOs may draw further numbers.
            ready = self._find(step, args, kwargs) if self._has_run else None
            if ready is None:
                loss = self._eager_loss(args, kwargs)
            elif ready.graph.audit_times.is_due():
                loss = self._audited_loss(step, ready, args, kwargs)
            else:
                loss = self._graph_loss(step, ready, args, kwargs)
            self._count(num_eager=ready is None)
            self._has_run = True
            return loss

    def audit(self) -> None:
        """Compare the graphs that have taken steps since their last audits with the programs.

        Call it after the last step of your loop. It warns of steps whose results are suspect. If
        ``fully_shard`` has wrapped the module, call it in all processes: it gathers the parameters.

        :raises RuntimeError: if an audit fails and ``fallback`` is False.
        """
        with gathered(self):
            super().audit()

    def _eager_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return super().forward(*args, **kwargs)

    def _graph_loss(
        self, step: ModuleStep, ready: ReadyGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        state = torch.get_rng_state() if is_validation_enabled() else None
        outputs = self._try(ready.graph, ready)
        if outputs is None:
            return self._eager_loss(args, kwargs)
        if state is not None and not math.isfinite(outputs[0].item()):
            # The programs raise an error or warn, each in its way.
            torch.set_rng_state(state)
            return self._eager_loss(args, kwargs)
        if step.has_gradients and isinstance(self.elbo, KLWeightedELBO):
            self.elbo.note_loss()
        return self._differentiable(ready, outputs)

    def _audited_loss(
        self, step: ModuleStep, ready: ReadyGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Run the programs, and compare them with the graph on the same noise and state."""
        found = self._try(ready.graph.rehearse, ready)
        if found is None:
            return self._eager_loss(args, kwargs)
        with poutine.trace(param_only=True) as trace:
            loss = self._eager_loss(args, kwargs)
        params = {name: ready.params[name] for name in ready.names}
        gradients = step.gradients(loss, params, retain_graph=True)
        expected = [loss.detach(), *gradients.values()]
        if self._passes(ready, expected, found, step.used_params(trace.trace)):
            return self._differentiable(ready, found.tensors)
        return loss

    def _differentiable(self, ready: ReadyGraph, outputs: Any) -> Tensor:
        loss, *gradients = outputs
        if self.backend.reuses_memory and loss.is_cuda:
            loss, gradients = loss.clone(), [x if x is None else x.clone() for x in gradients]
        params = [ready.params[name] for name in ready.names]
        return loss_with_gradients(loss, gradients, params)
