import math
from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_ext.infer.arguments import check_integer
from pyro_ext.infer.chunks import TraceChunk, chunk_sizes, first_pass, linearize, second_pass
from pyro_ext.infer.consistency import check_vectorization
from pyro_ext.infer.dependence import differs_between, track_provenance
from pyro_ext.infer.gradients import GRADIENT_RULES, bound_value
from pyro_ext.infer.handlers import SharedSubsamples, lies_in
from pyro_ext.infer.local_plate import check_local_plate
from pyro_ext.infer.not_finite import raise_not_finite
from pyro_ext.infer.particles import Particles, gather_particles, score_sites
from pyro_ext.infer.plates import (
    DensitySite,
    check_subsampling,
    density_sites,
    find_common_plates,
    warn_of_joint_weights,
)
from pyro_ext.infer.program_memory import ProgramMemory
from pyro_ext.infer.tracing import run_particles
from pyro_ext.ops import leave_one_out_mean


class MultiSampleELBO(ELBO):
    r"""Base class of objectives that are a function of K log importance weights.

    .. math::

        \mathrm{loss} = -\frac{N}{B} \sum_{n=1}^{B} f(\log w_{1n}, \dots, \log w_{Kn}), \qquad
        \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn})

    A subclass gives the function f, as :meth:`bound`, and may give its derivatives, as
    :meth:`first_and_second`. Everything else is here and is not meant to be overridden.

    Each plate that encloses all that depends on the particle (a common plate) keeps weights of
    its own, and its subsampling scale N / B stays outside of f. Particles that do not run
    vectorised share the minibatch. Scales and masks of the user stay inside the weights, but for
    a scale that is the same at every site, which stays outside.

    :param int num_particles: the number of particles K >= 1.
    :param str gradient: the gradient rule. ``"pathwise"`` is the exact gradient of the bound for
        fixed noise. ``"dreg"``, doubly reparameterised, has the same mean; near the posterior it
        is much quieter and far from it it can be noisier. ``"stl"``, sticking the landing, is as
        quiet, and biased for nonlinear bounds. Both need supports that do not move with parameters.
        Non-reparameterised sites of the guide add a score-function term with a baseline under each
        rule; Pyro's ``infer={"baseline": ...}`` is not used.
    :param bool vectorize_particles: whether the K particles run at once, in a plate to the left
        of all others; model and guide then see an extra dim on the left of every sample.
    :param max_plate_nesting: the number of nested plates; guessed by one run if infinite, afresh
        for each (model, guide).
    :param bool strict_enumeration_warning: accepted as by every ELBO of Pyro; sites that are
        marked for enumeration are refused either way.
    :param bool retain_graph: whether :meth:`loss_and_grads` keeps the autograd graph.
    :param int particle_chunk_size: at most how many particles have their graph in memory at once;
        None for all. The programs then run twice, and the gradients are those of all K particles.
        For :meth:`loss` and :meth:`loss_and_grads`, hence ``SVI``.
    :param str local_plate: the name of a plate, for models with global latent variables and local
        ones in that plate: one draw of all sites outside of it, K of those inside, and a bound
        for each point of the plate. The plate may then be subsampled. See
        Geffner and Domke (2022), Variational Inference with Locally Enhanced Bounds for
        Hierarchical Models. Non-reparameterised sites outside have no baseline.
    :raises ValueError: where an argument is out of range. When run: where sites or plates do not
        match between model and guide, where a site is marked for enumeration, where a plate is
        subsampled inside a nonlinear bound, where the model cannot take the extra dim, and where
        the loss is NaN (or, for gradients, infinite). Parameters and gradients are then as they
        were. A gradient that is NaN where the loss is finite is not looked for.
    :raises NotImplementedError: if both ``local_plate`` and ``particle_chunk_size`` are given.

    A bound of one's own, the mean of the log weights:

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
        check_integer(name, "num_particles", num_particles, 1)
        if max_plate_nesting != math.inf:
            check_integer(name, "max_plate_nesting (unless infinite)", max_plate_nesting, 0)
        if particle_chunk_size is not None:
            check_integer(name, "particle_chunk_size", particle_chunk_size, 2)
        if gradient not in GRADIENT_RULES:
            raise ValueError(
                f"{name}: expected gradient to be one of {sorted(GRADIENT_RULES)}, "
                f"got {gradient!r}."
            )
        if not (local_plate is None or isinstance(local_plate, str)):
            raise ValueError(
                f"{name}: expected local_plate to be the name of a plate, got {local_plate!r}."
            )
        if local_plate is not None and particle_chunk_size is not None:
            raise NotImplementedError(
                f"{name}: local_plate expects particle_chunk_size=None: each chunk would draw its "
                "own globals."
            )
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        # Pyro's constructor would add the particle plate to it.
        self.max_plate_nesting = max_plate_nesting
        self.gradient = gradient
        self.particle_chunk_size = particle_chunk_size
        self.local_plate = local_plate
        self._memory = ProgramMemory()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": ProgramMemory()}

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """The function f of the log weights.

        :param torch.Tensor log_w: log weights of shape ``(K, ...)``.
        :returns: a tensor of shape ``(...)``.
        """
        raise NotImplementedError

    def first_and_second(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        r"""First and pure second derivatives of :meth:`bound` in each log weight.

        By default they are computed by autograd, in K backward passes.

        :param torch.Tensor log_w: log weights of shape ``(K, ...)``.
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

    def signal(self, log_w: Tensor) -> Tensor:
        r"""What the non-reparameterised sites of each particle are rewarded by.

        .. math::

            f(\log w) - f(\log w \text{ with entry } k \text{ replaced by the mean of the others})

        The second term, a baseline, does not depend on particle k. It is 0 for K = 1 and where it
        would not be finite. By default K bounds are evaluated on a tensor of K times the size.

        Source: Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives.

        :param torch.Tensor log_w: log weights of shape ``(K, ...)``.
        :returns: a tensor of the same shape.
        """
        K = log_w.shape[0]
        if K == 1:
            return self.bound(log_w).unsqueeze(0)
        own = torch.eye(K, dtype=torch.bool, device=log_w.device)
        own = own.reshape(K, K, *(1,) * (log_w.dim() - 1))
        replaced = torch.where(own, leave_one_out_mean(log_w), log_w.unsqueeze(1))
        return self._against_baseline(log_w, self.bound(replaced))

    @property
    def guide_bound(self) -> "MultiSampleELBO":
        """The estimator whose bound the guide is trained on; this one, unless overridden."""
        return self

    def _against_baseline(self, log_w: Tensor, baseline: Tensor) -> Tensor:
        return self.bound(log_w) - baseline.where(baseline.isfinite(), 0.0)

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, minus the bound, from one trace of K particles.

        :param model: the model, a callable with Pyro primitives.
        :param guide: the guide, likewise.
        :param args: passed to both, as are ``kwargs``.
        """
        if self._is_chunked():
            loss, particles = self._loss_in_chunks(model, guide, args, kwargs)
        else:
            particles = self.trace_particles(model, guide, args, kwargs)
            loss = self._loss_of(particles.log_w, particles)
        if math.isnan(loss):
            self._refuse_loss(loss, particles)
        return loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, as :meth:`loss`, that also adds its gradients to ``.grad``."""
        if self._is_chunked():
            return self._loss_and_grads_in_chunks(model, guide, args, kwargs)
        particles = self.trace_particles(model, guide, args, kwargs)
        differentiable_loss = self._differentiable_loss(particles)
        loss = differentiable_loss.item()
        if not math.isfinite(loss):
            self._refuse_loss(loss, particles)
        if differentiable_loss.requires_grad:
            differentiable_loss.backward(retain_graph=self.retain_graph)
        return loss

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar tensor with the value of the loss and the gradient of the estimator.

        Under ``pyro.enable_validation(False)`` it looks at no value, so that it can be captured
        as a graph.
        """
        if self._is_chunked():
            raise NotImplementedError(
                f"{type(self).__name__}: particle_chunk_size={self.particle_chunk_size} expects "
                "loss_and_grads or SVI: one differentiable tensor would hold the graph of all "
                "particles."
            )
        particles = self.trace_particles(model, guide, args, kwargs)
        loss = self._differentiable_loss(particles)
        if is_validation_enabled() and not loss.isfinite():
            self._refuse_loss(loss.item(), particles)
        return loss

    def check(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> None:
        """Compares a vectorised particle, site by site, with the same particle run alone.

        It catches programs that silently mix particles, such as BatchNorm in training mode or a
        reshape that runs over the particle dim. Dropout is random and differs between the runs:
        put modules in evaluation mode. Where particles do not run vectorised there is nothing
        to compare.

        :raises ValueError: if the log-probability of a site differs; names the site.
        """
        if self.vectorize_particles and self.num_particles > 1:
            check_vectorization(
                model,
                guide,
                args,
                kwargs,
                num_particles=self.num_particles,
                max_plate_nesting=self._plate_nesting(model, guide, args, kwargs),
                local_plate=self.local_plate,
            )

    def trace_particles(
        self,
        model: Callable,
        guide: Callable,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        subsamples: SharedSubsamples | None = None,
        num_particles: int | None = None,
    ) -> Particles:
        """Runs the guide, and the model against it, for K particles.

        :param tuple args: positional arguments of both programs.
        :param dict kwargs: keyword arguments of both programs.
        :param SharedSubsamples subsamples: minibatch indices to use, or to record.
        :param int num_particles: in place of the estimator's own.
        """
        kwargs = kwargs or {}
        num_particles = self.num_particles if num_particles is None else num_particles
        for program, value in (("model", model), ("guide", guide)):
            if not callable(value):
                raise ValueError(
                    f"{type(self).__name__}: expected a callable {program}, got {value!r}."
                )
        memory = self._recall(model, guide)
        vectorized = self.vectorize_particles and num_particles > 1
        local_plate = self.local_plate if num_particles > 1 else None
        rows = subsamples or SharedSubsamples()  # for runs that hide their sites from handlers
        programs = rows(model), rows(guide)
        traces = run_particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=num_particles,
            max_plate_nesting=(
                self._plate_nesting(model, guide, args, kwargs, programs)
                if vectorized
                else self.max_plate_nesting
            ),
            vectorized=vectorized,
            leaves=torch.is_grad_enabled() and self._needs_leaves(),
            subsamples=subsamples,
            local_plate=local_plate,
        )

        pairs = zip(traces.model_traces, traces.guide_traces, strict=True)
        by_particle = [
            density_sites("model", model_trace) + density_sites("guide", guide_trace)
            for model_trace, guide_trace in pairs
        ]

        def has_provenance(site: DensitySite) -> bool:
            if site[:2] not in memory.provenance.seen:
                memory.provenance = track_provenance(*programs, args, kwargs, local_plate)
            return site[:2] in memory.provenance.dependent

        def depends(site: DensitySite) -> bool:
            if vectorized:
                return traces.depends_on_particle(site.program, site.name)
            return has_provenance(site) or differs_between(by_particle, site)

        sites = [site for row in by_particle for site in row]
        if local_plate is not None:
            is_checked = is_validation_enabled() or not vectorized
            check_local_plate(local_plate, by_particle, has_provenance if is_checked else None)
            sites = [site for site in sites if lies_in(site.node, local_plate)]
        inside = {(site.program, site.name) for site in sites}
        common = find_common_plates(sites, depends)

        def is_outer(site: DensitySite) -> bool:
            if site[:2] not in inside:
                return True
            return site.is_observed and not site.plates.issuperset(common) and not depends(site)

        if num_particles > 1:
            check_subsampling(sites, common, depends)
            if not common:
                warn_of_joint_weights(sites, memory.warned_plates)
        return gather_particles(traces, by_particle, common, is_outer, local_plate)

    def _is_chunked(self) -> bool:
        size = self.particle_chunk_size
        return size is not None and size < self.num_particles

    def _loss_in_chunks(
        self, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float, Particles]:
        log_w, particles, _ = first_pass(*self._chunks(model, guide, args, kwargs))
        return self._loss_of(log_w, particles), particles

    def _loss_and_grads_in_chunks(
        self, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float:
        trace, sizes = self._chunks(model, guide, args, kwargs)
        log_w, particles, states = first_pass(trace, sizes)
        loss = self._loss_of(log_w, particles)
        for value in (loss, self.guide_bound._loss_of(log_w, particles)):
            if not math.isfinite(value):
                self._refuse_loss(value, particles)
        linear = linearize(self, log_w, particles.score is not None)
        del particles  # nothing of one chunk is to live while another runs
        for index, particles in second_pass(trace, sizes, states):
            self._check_rule(particles)
            rule = GRADIENT_RULES[self.gradient]
            if index.start > 0:
                particles = replace(particles, outer_terms=())
            surrogate = -rule.objective(linear.part(index), particles)
            if surrogate.requires_grad:
                surrogate.backward(retain_graph=self.retain_graph)
            del particles, surrogate
        return loss

    def _chunks(
        self, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TraceChunk, list[int]]:
        memory = self._recall(model, guide)
        if memory.plate_nesting is None:
            # What happens in a first run only, such as drawing initial values, happens here.
            memory.plate_nesting = self._guess_plate_nesting(model, guide, args, kwargs)
        sizes = chunk_sizes(self.num_particles, self.particle_chunk_size or self.num_particles)
        return partial(self.trace_particles, model, guide, args, kwargs), sizes

    def _loss_of(self, log_w: Tensor, particles: Particles) -> float:
        bound = bound_value(self, log_w.detach())
        return float(-(particles.scale * bound).sum() - torch.as_tensor(particles.outer).detach())

    def _needs_leaves(self) -> bool:
        return GRADIENT_RULES[self.gradient].leaves or self.guide_bound is not self

    def _differentiable_loss(self, particles: Particles) -> Tensor:
        self._check_rule(particles)
        return -GRADIENT_RULES[self.gradient].objective(self, particles)

    def _check_rule(self, particles: Particles) -> None:
        rule = GRADIENT_RULES[self.gradient]
        draws = particles.outer_draws + particles.draws
        names = [site["name"] for site, _ in score_sites(particles.guide_traces[0])]
        if rule.leaves and names and not draws:
            raise ValueError(
                f"gradient={self.gradient!r} expects a reparameterised site with parameters in "
                f"the guide, got only {names}, which are not: use gradient='pathwise'."
            )

    def _refuse_loss(self, loss: float, particles: Particles) -> NoReturn:
        raise_not_finite(f"{type(self).__name__}: the loss", loss, particles)

    def _recall(self, model: Callable, guide: Callable) -> ProgramMemory:
        if not self._memory.is_of(model, guide):
            self._memory = ProgramMemory(model, guide)
        return self._memory

    def _plate_nesting(
        self,
        model: Callable,
        guide: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        programs: tuple[Callable, Callable] | None = None,
    ) -> float:
        if self.max_plate_nesting != math.inf:
            return self.max_plate_nesting
        memory = self._recall(model, guide)
        if memory.plate_nesting is None:
            model, guide = programs or (model, guide)
            memory.plate_nesting = self._guess_plate_nesting(model, guide, args, kwargs)
        return memory.plate_nesting

    @torch.no_grad()
    def _guess_plate_nesting(
        self, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float:
        probe = copy(self)
        probe.vectorize_particles = False
        probe._guess_max_plate_nesting(model, guide, args, kwargs)
        return probe.max_plate_nesting

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} traces by trace_particles.")
