import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext._private.of_torch import has_gradient_hooks
from pyro_ext.infer.kl.kl_weighted import KLWeightedELBO
from pyro_ext.infer.svi.capture.front import Front, Settings, held_level
from pyro_ext.infer.svi.capture.graph_inputs import params_kept_in_place, params_of
from pyro_ext.infer.svi.capture.graphs import ReadyGraph
from pyro_ext.infer.svi.capture.step import SVIStep, as_tensor
from pyro_ext.infer.svi.eager_svi import EagerSVI
from pyro_ext.tracing import Program


class CompiledSVI(Front, EagerSVI):
    r"""Pyro's ``SVI`` with steps that run as one compiled graph.

    The first step is Pyro's own. At its end, the loss and its gradients are captured as a graph.
    The graph is checked against an eager step on the same noise, and then compiled. Later steps run
    no effect handlers, except in audits. The graph gives the same results as ``SVI`` from the same
    random numbers, up to rounding, and ``pyro.set_rng_seed`` seeds it. Each combination of shapes,
    dtypes, devices and plain values among the arguments gets its own graph.

    Each step reads the current parameters, buffers and other tensors. Updates,
    ``load_state_dict`` and edits of the param store therefore take effect at once. Each step
    compares the plain values that model and guide reach by name: attributes, globals, closures,
    and the ``training`` flag of modules. If a value has changed, the step gets another graph.
    Floats are inputs of the graph if they are arguments, or attributes of the objective such as
    an alpha. The factor of a :class:`KLWeightedELBO` is an input too.

    Some changes escape this comparison. Therefore audits compare the graph with Pyro's own step on
    the same noise and state, at random steps: often at first, and later at least every
    ``audit_every`` steps of a graph. If they differ beyond rounding, the steps after the audit are
    eager, and a warning names the steps whose results are suspect.

    A capture runs model and guide three times, with separate random numbers. Side effects other
    than those on tensors, such as printing and counting, happen only in captures and audits.

    Numbers and shapes that the programs compute from data are compared at each step, too. Some
    steps cannot be captured: those with a branch or a shape that depends on a draw or a parameter,
    random numbers of Python or NumPy, gradients of tensors outside of the param store, or hooks on
    gradients. ``CompiledSVI`` then takes eager steps, and one warning gives the
    reason. The same holds for any error in a capture, in the compiler or in a graph. Distributions
    do not validate their arguments in a compiled step. After it, the ``.grad`` of parameters is
    None.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, a callable with Pyro primitives.
    :param optim: the optimiser. If its torch optimiser has a fused or foreach implementation, that
        implementation steps all parameters at once.
    :param loss: an ELBO of this package or of Pyro, or a function that returns a differentiable
        loss.
    :param backend: ``"inductor"`` compiles the graph. That takes seconds, and needs a C++ compiler
        on a CPU. ``"eager"`` runs the graph without compiling it.
    :param mode: a mode of ``torch.compile`` for Inductor: ``"default"``, ``"reduce-overhead"``,
        ``"max-autotune"`` or ``"max-autotune-no-cudagraphs"``. ``"reduce-overhead"`` uses CUDA
        graphs on a GPU.
    :param fallback: whether to take eager steps, with a warning, if there is no graph. If False,
        that is an error.
    :param max_graphs: the largest number of graphs, >= 1. A graph that has not been used for 1,000
        steps makes room for a new one.
    :param compile_after: the number of eager steps, >= 0, before arguments of the same shapes and
        values get a graph. Set it if many steps come in shapes that come only a few times.
    :param audit_every: the largest number of steps of a graph from one audit to the next, >= 1. An
        audit costs about as much as one eager step and one compiled step.
    :param reads_loss_every: the number of steps, >= 1, whose losses are read at once; see
        :class:`EagerSVI`. Then a step that runs a graph does not wait for a GPU.
    :raises TypeError: if ``max_graphs``, ``compile_after``, ``audit_every`` or ``reads_loss_every``
        is not an integer.
    :raises ValueError: if an argument is out of range. A step raises it if the loss is not finite,
        and then leaves the parameters as they were.
    :raises RuntimeError: in a step, if the step cannot be captured or an audit fails, and
        ``fallback`` is False.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import ImportanceWeightedELBO
    >>> pyro.set_rng_seed(0)
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
    >>> svi = CompiledSVI(
    ...     model, guide, pyro.optim.Adam({"lr": 0.1}), ImportanceWeightedELBO(8), backend="eager"
    ... )
    >>> losses = [svi.step() for _ in range(100)]
    >>> abs(pyro.param("loc").item() - 1.0) < 0.3
    True
    """

    _front = "CompiledSVI"
    _bucket_bytes = math.inf

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim,
        loss: Any,
        backend: str = "inductor",
        mode: str = "default",
        fallback: bool = True,
        max_graphs: int = 8,
        compile_after: int = 0,
        audit_every: int = 5000,
        reads_loss_every: int = 1,
    ) -> None:
        settings = Settings.checked(
            self._front, backend, mode, fallback, max_graphs, compile_after, audit_every
        )
        super().__init__(model, guide, optim, loss, reads_loss_every)
        self._with_gradients: set[str] = set()
        self._set_up(settings)

    def _announce(self, is_capturing: bool) -> None:
        """Show in the progress bar whether a step is being captured and compiled."""
        if self._bar is not None:
            self._bar.set_description("compiling" if is_capturing else "")

    def _note(self, event: str) -> None:
        super()._note(event)
        self.history.events.append((len(self.history.losses), event))

    def _count(self, num_eager: int) -> None:
        super()._count(num_eager)
        self.history.num_eager_steps += num_eager

    def _end_run(self) -> None:
        self.audit()

    def _take_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with held_level(self.objective):
            if self._called is None:
                loss = super()._take_step(args, kwargs)
                self._count(num_eager=1)
                self._ready(True, args, kwargs)
                return loss
            ready = self._ready(True, args, kwargs)
            if ready is not None and any(has_gradient_hooks(ready.params[n]) for n in ready.names):
                self._do_without(
                    "a graph does not run the hook on the gradient of a parameter. Remove the hook"
                )
                ready = None
            if ready is None:
                loss = self._eager_step(*args, **kwargs)
            elif ready.graph.audit_times.is_due():
                loss = self._audited_step(ready, args, kwargs)
            else:
                loss = self._graph_step(ready, args, kwargs)
            self._count(num_eager=ready is None)
            return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss without taking a step, like ``SVI.evaluate_loss``.

        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss.
        :raises ValueError: if the loss is NaN.
        :raises RuntimeError: as for the class.
        """
        # Parameters that are created in inference mode could never be trained.
        with held_level(self.objective), torch.inference_mode(False), torch.no_grad():
            ready = None if self._called is None else self._ready(False, args, kwargs)
            is_audited = ready is not None and ready.graph.audit_times.is_due()
            outputs = None
            if ready is not None:
                run = ready.graph.rehearse if is_audited else ready.graph
                outputs = self._try(run, ready)
            if ready is None or outputs is None:
                return super().evaluate_loss(*args, **kwargs)
            if is_audited:
                loss = super().evaluate_loss(*args, **kwargs)
                passed = self._passes(ready, [as_tensor(loss)], outputs)
                return as_tensor(outputs.tensors[0]).item() if passed else loss
            loss = outputs[0].item()
            if math.isnan(loss):
                self._raise_for(loss, args, kwargs)
            return loss

    def _finish(
        self,
        loss: Any,
        params: dict[str, Tensor],
        gradients: dict[str, Tensor | None],
        rows: list[int],
    ) -> Any:
        """Add the gradients to those of the user, and update the parameters.

        :param loss: the loss.
        :param params: the parameters by name.
        :param gradients: their gradients by name.
        :param rows: the numbers of rows in the plates that are divided over processes.
        :returns: the loss; its mean over processes if there are several.
        """
        seen = self._with_gradients
        for name, gradient in gradients.items():
            param = params[name]
            if gradient is not None:
                param.grad = gradient if param.grad is None else param.grad + gradient
                seen.add(name)
            elif param.grad is None and name in seen:
                param.grad = torch.zeros_like(param)  # as Pyro leaves it after a step
        used = list(params.values())
        if self._group is not None:
            loss, used = self._mean_in_place(loss, params, rows)
        self._update(used, loss)
        for param in used:
            param.grad = None
        return loss

    def _set_gradients(self, params: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        super()._set_gradients(params, gradients)
        self._with_gradients |= params.keys()

    def _graph_step(self, ready: ReadyGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = self._try(ready.graph, ready)
        if outputs is None:
            return self._eager_step(*args, **kwargs)
        loss, *gradients = outputs
        if self._reads_late:
            loss = loss.clone() if ready.graph.reuses_memory else loss
        else:
            loss = loss.item()
            if not math.isfinite(loss):
                self._raise_for(loss, args, kwargs)
        loss = self._finish(loss, *ready.named(gradients), ready.graph.rows)
        if isinstance(self.objective, KLWeightedELBO):
            self.objective.note_loss()
        return loss

    def _audited_step(
        self, ready: ReadyGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Take Pyro's step, and compare it with the graph on the same noise and state."""
        found = self._try(ready.graph.rehearse, ready)
        if found is None:
            return self._eager_step(*args, **kwargs)
        before = {param: param.grad for param in ready.params.values()}
        for param in before:
            param.grad = None
        gradients: dict[Tensor, Tensor | None] = {}
        used: dict[str, Tensor] = {}
        try:
            with params_kept_in_place(), poutine.trace(param_only=True) as trace:
                loss = torch_item(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
            used = params_of(trace.trace)
            gradients = {param: param.grad for param in used.values()}
        finally:
            for param in {**before, **gradients}:
                param.grad = before.get(param)
        if not math.isfinite(loss):
            self._raise_for(loss, args, kwargs)
        of_names = [gradients.get(ready.params[name]) for name in ready.graph.names]
        if self._passes(ready, [as_tensor(loss), *of_names], found, used):
            loss = as_tensor(found.tensors[0])
            loss = loss if self._reads_late else loss.item()
            return self._finish(loss, *ready.named(found.tensors[1:]), ready.graph.rows)
        first_names = {param: name for name, param in reversed(used.items())}
        params = {name: param for param, name in first_names.items()}
        by_name = {name: gradients.get(param) for name, param in params.items()}
        return self._finish(loss, params, by_name, ready.graph.rows)

    def _eager_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take Pyro's step, with the optimiser that compiled steps use."""
        if pyro.settings.get("module_local_params"):
            return super()._eager_step(*args, **kwargs)
        with poutine.trace(param_only=True) as trace:
            loss = self._loss_with_gradients(args, kwargs)
        used = params_of(trace.trace)
        for name, param in used.items():
            if param.grad is None and name in self._with_gradients:
                param.grad = torch.zeros_like(param)  # as Pyro leaves it after a step
        params = list(dict.fromkeys(used.values()))  # tied parameters once
        if self._group is not None:
            loss, params = self._mean_in_place(loss, used)
        self._update(params, loss)
        zero_grads(params)
        return loss

    def _ready(
        self, has_gradients: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ReadyGraph | None:
        """Return the graph for these arguments, or None for an eager step."""
        if has_gradients > torch.is_grad_enabled():
            return None
        svi_loss = self.loss_and_grads if has_gradients else self.loss
        handlers = tuple(HANDLER_STACK)
        step = SVIStep(self.objective, self.model, self.guide, has_gradients, handlers, svi_loss)
        return self._find(step, args, kwargs)

    def _raise_for(self, loss: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with pyro.validation_enabled(False):
            # An error of the ELBO names the site where the loss stops being finite.
            self.loss(self.model, self.guide, *args, **kwargs)
        raise ValueError(
            f"CompiledSVI: the loss is {loss}. Check the data, the parameters and the learning "
            "rate; this step has not changed the parameters."
        )
