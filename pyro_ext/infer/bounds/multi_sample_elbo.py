import math
from abc import abstractmethod
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_ext._deprecated import keep_old_methods
from pyro_ext._private.of_torch import outside_of_dynamo
from pyro_ext.infer.bounds.guide_sums import or_trace_enum_elbo
from pyro_ext.infer.bounds.options import check_options
from pyro_ext.infer.gradients.rules import GRADIENT_RULES, GradientRule, bound_value
from pyro_ext.infer.gradients.two_pass import TwoPass, linearize
from pyro_ext.ops import leave_one_out_mean
from pyro_ext.tracing import Particles, ParticleTracer, Program, Programs
from pyro_ext.tracing.arguments import check_program
from pyro_ext.tracing.failures import raise_for_hidden_nan, raise_not_finite
from pyro_ext.tracing.leaves import Leaves
from pyro_ext.tracing.tracer import TracerMemory

_OLD_METHODS = {"first_and_second": "derivatives", "signal": "learning_signal"}


class MultiSampleELBO(ELBO):
    r"""The base class of objectives that are a function of K log importance weights.

    .. math::

        \mathrm{loss} = -\frac{N}{B} \sum_{n=1}^{B} f(\log w_{1n}, \dots, \log w_{Kn}), \qquad
        \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn})

    A subclass overrides :meth:`bound`, the function f, and optionally :meth:`derivatives`,
    :meth:`learning_signal`, :attr:`guide_bound`, :attr:`gradient_bound` and :attr:`is_linear`. The
    gradient rules, particle chunks and compiled steps combine these members in different ways. An
    override of another method, such as :meth:`loss`, would change only some of the results.

    A common plate encloses every site that depends on the particle. Each element of the common
    plates has its own log weights and its own bound. The subsampling scale N / B multiplies f
    itself. It is not part of the log weights. All particles have the same minibatch, also if they
    run one at a time. The user's scales and masks are part of the weights, with one exception: a
    scale that is the same at every site multiplies f itself.

    Sites of the model that are marked for enumeration are summed out for each particle, unless the
    guide has them. Marked sites of the guide need one particle.

    :param num_particles: the number of particles K >= 1.
    :param gradient: the gradient rule. ``"pathwise"`` is the exact gradient of the bound for fixed
        noise. ``"dreg"``, doubly reparameterised, has the same mean. Its variance is much lower
        than that of ``"pathwise"`` if the guide is near the posterior. It can be higher if the
        guide is far from it. ``"stl"``, sticking the landing, has a variance as low as ``"dreg"``
        near the posterior, but is biased for nonlinear bounds. ``"dreg"`` and ``"stl"`` need guide
        sites whose support does not depend on parameters. With each rule, non-reparameterised guide
        sites add a score-function term with a baseline. Pyro's ``infer={"baseline": ...}`` is not
        used.
    :param vectorize_particles: whether the K particles run at once, in an extra dim on the left of
        every sample.
    :param max_plate_nesting: the number of nested plates, >= 0. With infinity, one run of each new
        model and guide finds it.
    :param strict_enumeration_warning: accepted for compatibility with Pyro, without an effect.
    :param retain_graph: whether :meth:`loss_and_grads` keeps the autograd graph.
    :param particle_chunk_size: the largest number of particles, >= 1, whose graph is in memory at
        once, in :meth:`loss` and :meth:`loss_and_grads`. By default, there is no limit. With
        chunks, model and guide run twice. The gradients are those of all K particles.
    :param local_plate: the name of a plate, for models with global latent variables and with local
        latent variables in that plate. Sites outside the plate are drawn once. Sites inside it are
        drawn K times. Each element of the plate has its own bound, and the plate may be subsampled.
        Non-reparameterised sites outside have no baseline. With None, all sites are drawn K times.
        See Geffner and Domke (2022), Variational Inference with Locally Enhanced Bounds for
        Hierarchical Models.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range. A run raises it if sites or plates do not
        match between model and guide, if their masks or rows differ, if a marked site cannot be
        summed out, if a plate is subsampled inside a nonlinear bound, if the model cannot take the
        extra dim or mixes particles (see :meth:`check`), or if the loss is NaN. A
        run with gradients also raises it if the loss is infinite. Parameters and gradients keep
        their values after an error. A NaN gradient of a finite loss is detected in the first run
        only, and only if it comes from NaN under a mask.
    :raises NotImplementedError: if both ``local_plate`` and ``particle_chunk_size`` are given.

    A bound of your own:

    >>> import pyro, pyro.distributions as dist
    >>> class MeanELBO(MultiSampleELBO):
    ...     def bound(self, log_w):
    ...         return log_w.mean(0)
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(0.0, 0.5**0.5))
    >>> round(MeanELBO(num_particles=3).loss(model, guide), 4)  # the guide is the posterior
    1.2655
    """

    def __init__(
        self,
        num_particles: int = 2,
        gradient: str = "pathwise",
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
        particle_chunk_size: int | None = None,
        local_plate: str | None = None,
    ) -> None:
        name = type(self).__name__
        check_options(
            name, num_particles, gradient, max_plate_nesting, local_plate, particle_chunk_size
        )
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        # Set here, because Pyro's constructor would add one for the particle plate.
        self.max_plate_nesting = max_plate_nesting
        self.gradient = gradient
        self.particle_chunk_size = particle_chunk_size
        self.local_plate = local_plate
        self._memory = TracerMemory()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keep_old_methods(cls, **_OLD_METHODS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": TracerMemory()}

    @property
    def tracer(self) -> ParticleTracer:
        """The tracer that runs model and guide with the current settings."""
        return ParticleTracer(
            num_particles=self.num_particles,
            vectorize=self.vectorize_particles,
            max_plate_nesting=self.max_plate_nesting,
            local_plate=self.local_plate,
            is_linear=self.is_linear,
            memory=self._memory,
        )

    @abstractmethod
    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        """Return the function f of the log weights.

        :param log_w: log weights of shape ``(K, ...)``.
        :returns: a tensor of shape ``(...)``.
        """
        raise NotImplementedError

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        r"""Return the first and pure second derivatives of :meth:`bound` in each log weight.

        By default, autograd computes them in K backward passes.

        :param log_w: log weights of shape ``(K, ...)``.
        :returns: :math:`f_k = \partial f / \partial \log w_k` and
            :math:`f_{kk} = \partial^2 f / \partial (\log w_k)^2`, each of shape ``(K, ...)``.
        """
        with torch.enable_grad():
            log_w = log_w.detach().requires_grad_()
            (first,) = torch.autograd.grad(self.bound(log_w).sum(), log_w, create_graph=True)
            if not first.requires_grad:
                return first, torch.zeros_like(first)
            second = [
                torch.autograd.grad(row.sum(), log_w, retain_graph=True)[0][k]
                for k, row in enumerate(first)
            ]
        return first.detach(), torch.stack(second)

    def learning_signal(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        r"""Return the learning signal: the reward of each particle's non-reparameterised sites.

        .. math::

            f(\log w) - f(\log w \text{ with entry } k \text{ replaced by the mean of the others})

        The second term is a baseline, which does not depend on particle k. The baseline is 0 for
        K = 1, and wherever it would not be finite. By default, :meth:`bound` is evaluated on a
        tensor with K times as many elements as ``log_w``, unless the bound is linear.

        :param log_w: log weights of shape ``(K, ...)``.
        :returns: a tensor of the same shape.

        Source: Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives.
        """
        if (K := log_w.shape[0]) == 1:
            return self.bound(log_w).unsqueeze(0)
        if self.is_linear:
            return (log_w - leave_one_out_mean(log_w)) / K
        own = torch.eye(K, dtype=torch.bool, device=log_w.device)
        own = own.reshape(K, K, *(1,) * (log_w.dim() - 1))
        replaced = torch.where(own, leave_one_out_mean(log_w), log_w.unsqueeze(1))
        return self._against_baseline(log_w, self.bound(replaced))

    @property
    def is_linear(self) -> bool:
        """Whether this bound and its guide bound are the mean of the log weights.

        A linear bound accepts every plate. By default, a bound is linear for K = 1 only.
        """
        return self.num_particles == 1

    @property
    def guide_bound(self) -> "MultiSampleELBO":
        """The estimator whose bound trains the guide; this estimator, unless overridden."""
        return self

    @property
    def gradient_bound(self) -> "MultiSampleELBO":
        """The estimator that trains model and guide; this estimator, unless overridden."""
        return self

    def model_weights(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the weights of the model's gradient if :attr:`guide_bound` is another estimator.

        By default, they are :math:`f_k`.

        :param log_w: log weights of shape ``(K, ...)``.
        :returns: a tensor of the same shape.
        """
        return self.derivatives(log_w)[0]

    def _against_baseline(
        self, log_w: Float[Tensor, "K *common"], baseline: Float[Tensor, "K *common"]
    ) -> Float[Tensor, "K *common"]:
        return self.bound(log_w) - baseline.where(baseline.isfinite(), 0.0)

    @or_trace_enum_elbo
    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss (the negative bound) from one trace of K particles.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss, in nats.
        :raises ValueError: if the loss is NaN. The class lists further cases.
        """
        programs = self._programs(model, guide, args, kwargs)
        if self._is_chunked:
            log_w, particles = self._two_pass(programs).weigh()
        else:
            particles = self.tracer.trace(programs)
            log_w = particles.log_w
        loss = self._loss_of(log_w, particles)
        if math.isnan(loss):
            self._raise_for_loss(loss, particles)
        return loss

    @or_trace_enum_elbo
    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, and add its gradients to the parameters' ``.grad``.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss, in nats.
        :raises ValueError: if the loss is NaN or infinite. The class lists further cases.
        """
        programs = self._programs(model, guide, args, kwargs)
        if self._is_chunked:
            return self._loss_and_grads_in_chunks(programs)
        particles = self._trace(programs)
        differentiable_loss = -self._rule.objective(self, particles)
        loss = differentiable_loss.item()
        if not math.isfinite(loss):
            self._raise_for_loss(loss, particles)
        if differentiable_loss.requires_grad:
            differentiable_loss.backward(retain_graph=self.retain_graph)
        return loss

    @outside_of_dynamo
    @or_trace_enum_elbo
    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss as a scalar tensor, whose gradient is the gradient estimate.

        Under ``pyro.enable_validation(False)`` no tensor value is read, so the computation can be
        captured as a graph.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss, in nats.
        :raises NotImplementedError: if ``particle_chunk_size`` is below ``num_particles``.
        :raises ValueError: if the loss is NaN or infinite, under validation. The class lists
            further cases.
        """
        if self._is_chunked:
            raise NotImplementedError(
                f"{type(self).__name__}: differentiable_loss does not support "
                f"particle_chunk_size={self.particle_chunk_size}, because its result holds the "
                "graph of all particles. Use loss_and_grads or SVI."
            )
        particles = self._trace(self._programs(model, guide, args, kwargs))
        loss = -self._rule.objective(self, particles)
        if is_validation_enabled() and not loss.isfinite():
            self._raise_for_loss(loss.item(), particles)
        return loss

    def check(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> None:
        """Compare a vectorised particle, site by site, with the same particle run alone.

        The check finds programs that mix particles silently, for example by BatchNorm in training
        mode or by a reshape over the particle dim. The first step of each model and guide runs the
        same check, unless ``pyro.enable_validation(False)`` is set. Unlike the first step, this
        method also raises an error if a program is random for given draws, as by dropout, because
        nothing can be compared. Random states and buffers keep their values. If particles do not
        run vectorised, nothing is compared.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :raises ValueError: if the log-probability of a site differs, or is random. The message
            names the site.
        """
        if self.vectorize_particles and self.num_particles > 1:
            self.tracer.check(self._programs(model, guide, args, kwargs))

    def trace_particles(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Particles:
        """Run the guide, and then the model with the guide's draws, for K particles.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide, as a tuple.
        :param kwargs: keyword arguments of model and guide, as a dict.
        :returns: the log weights and traces, as :class:`Particles`.
        """
        return self._trace(self._programs(model, guide, args, kwargs or {}))

    def _programs(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Programs:
        owner = type(self).__name__
        model, guide = check_program(owner, "model", model), check_program(owner, "guide", guide)
        return Programs(model, guide, args, kwargs)

    def _trace(self, programs: Programs) -> Particles:
        has_gradients = torch.is_grad_enabled()
        leaves = self._rule.leaves(self) if has_gradients else Leaves.NOWHERE
        particles = self.tracer.trace(programs, leaves=leaves)
        if has_gradients and not self._memory.is_checked_for_nan and is_validation_enabled():
            raise_for_hidden_nan(type(self).__name__, particles)
            self._memory.is_checked_for_nan = True
        return particles

    @property
    def _is_chunked(self) -> bool:
        size = self.particle_chunk_size
        return size is not None and size < self.num_particles

    def _two_pass(self, programs: Programs) -> TwoPass:
        chunk_size = self.particle_chunk_size or self.num_particles
        return TwoPass(self.tracer, programs, chunk_size)

    def _loss_and_grads_in_chunks(self, programs: Programs) -> float:
        passes = self._two_pass(programs)
        log_w, particles = passes.weigh()
        loss = self._loss_of(log_w, particles)
        for value in (loss, self.guide_bound._loss_of(log_w, particles)):
            if not math.isfinite(value):
                self._raise_for_loss(value, particles)
        linear = linearize(self, log_w, particles.score is not None)
        del particles
        passes.differentiate(self._rule, linear, self.retain_graph)
        return loss

    def _loss_of(self, log_w: Tensor, particles: Particles) -> float:
        bound = bound_value(self, log_w.detach())
        return float(-(particles.scale * bound).sum() - torch.as_tensor(particles.outer).detach())

    @property
    def _rule(self) -> GradientRule:
        return GRADIENT_RULES[self.gradient]

    def _raise_for_loss(self, loss: float, particles: Particles) -> NoReturn:
        raise_not_finite(f"{type(self).__name__}: the loss", loss, particles)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: use trace_particles.")


keep_old_methods(MultiSampleELBO, **_OLD_METHODS)
