import warnings
from typing import Any

import torch
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._arguments import check_type, describe
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.kl.schedules import KLSchedule
from pyro_ext.infer.kl.site_selection import Sites, SiteSelection, select_sites
from pyro_ext.tracing import Program, Programs

#: The number of losses at one step of the schedule after which to warn.
_PATIENCE = 300

#: The memory before the first run: no model and guide, and none with weighted sites.
_NO_PAIR = (None, None)


class KLWeightedELBO(ELBO):
    r"""An ELBO whose KL term is multiplied by a factor that follows a schedule.

    .. math:: \mathrm{loss} = -\mathbb{E}_q \bigl[ \log p(x \mid z)
        + \mathrm{factor} \cdot (\log p(z) - \log q(z)) \bigr]

    The factor multiplies the terms of the chosen latent sites, in model and guide. Its value is
    that of the schedule's current step. Evaluating a loss does not advance the schedule. If 300
    losses for gradients are evaluated while the schedule stands still, a warning is given once. For
    the plain loss, with factor 1, use :attr:`elbo`.

    :param elbo: an objective that is linear in log p - log q: Pyro's ``Trace_ELBO``,
        ``TraceMeanField_ELBO``, ``TraceGraph_ELBO`` or ``TraceEnum_ELBO`` with any number of
        particles, or a :class:`MultiSampleELBO` with one particle.
    :param schedule: the factor at each step. A schedule belongs to one objective only.
    :param sites: the latent sites whose terms are multiplied. ``"global"`` selects the sites that
        several data points share. A latent site is
        global if every observed site that has plates lies in at least one plate that does not
        contain the latent site. If no observed site has a
        plate, ``"global"`` selects all latent sites. ``"all"`` is meant for the warm-up of models
        with local latent variables. A collection of names, or a function from a name to a bool,
        selects sites one by one. An auxiliary site of the guide is weighted if the site to which it
        belongs is weighted.
    :raises TypeError: if ``elbo`` or ``schedule`` has the wrong type.
    :raises ValueError: if ``elbo`` is not linear, if ``sites`` is another string, or if the
        schedule belongs to another objective. A run raises it if ``sites`` matches no latent site,
        or if the guide draws weighted and unweighted sites together.

    Sources: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), Weight Uncertainty in Neural
    Networks, section 3.4; Bowman et al. (2016), Generating Sentences from a Continuous Space.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, TraceMeanField_ELBO
    >>> from pyro_ext.infer import GeometricKL
    >>> batches = torch.randn(3, 10)
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", 30, subsample=x):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = pyro.infer.autoguide.AutoNormal(model)
    >>> schedule = GeometricKL(num_batches=len(batches))
    >>> elbo = KLWeightedELBO(TraceMeanField_ELBO(), schedule)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    >>> for x in batches:
    ...     loss = svi.step(x)
    ...     schedule.step()
    """

    def __init__(self, elbo: ELBO, schedule: KLSchedule, sites: Sites = "global") -> None:
        _check_linear(elbo)
        check_type("KLWeightedELBO", "schedule", schedule, KLSchedule, "an instance of KLSchedule")
        if isinstance(sites, str) and sites not in ("global", "all"):
            raise ValueError(
                "KLWeightedELBO: sites must be 'global', 'all', a collection of names or a "
                f"function of a name, but it is {describe(sites)}."
            )
        if schedule.is_in_use:
            raise ValueError(
                "KLWeightedELBO: the schedule belongs to another KLWeightedELBO. If both stepped "
                "it, it would advance twice as fast. Make a new schedule for each."
            )
        super().__init__()
        self.num_particles = elbo.num_particles
        #: The plain objective, whose loss has the factor 1.
        self.elbo: Any = elbo
        self.schedule = schedule
        self.sites = sites
        self._memory: Any = _NO_PAIR
        self._num_losses = 0  # since the schedule was at another step
        self._step_of_losses = schedule.num_steps_taken
        self._has_warned = False
        schedule.is_in_use = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": _NO_PAIR}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.schedule.is_in_use = True

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss with the current factor.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss, in nats.
        """
        weighted = self._weighted(Programs(model, guide, args, kwargs))
        return self.elbo.loss(weighted.model, weighted.guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, and add its gradients to the parameters' ``.grad``.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss, in nats.
        """
        self.note_loss()
        weighted = self._weighted(Programs(model, guide, args, kwargs))
        return self.elbo.loss_and_grads(weighted.model, weighted.guide, *args, **kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss as a tensor, if ``elbo`` supports it.

        :param model: the model: a callable with Pyro primitives.
        :param guide: the guide: a callable with Pyro primitives.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: a scalar tensor, in nats.
        """
        if torch.is_grad_enabled():
            self.note_loss()
        weighted = self._weighted(Programs(model, guide, args, kwargs))
        return self.elbo.differentiable_loss(weighted.model, weighted.guide, *args, **kwargs)

    def note_loss(self, stacklevel: int = 4) -> None:
        """Count a loss that a gradient was computed of, and warn once if the schedule stands still.

        :meth:`loss_and_grads` and :meth:`differentiable_loss` call this method. Call it where a
        loss is computed without them.

        :param stacklevel: the number of calls between the warning and the user's code.
        """
        schedule = self.schedule
        if schedule.num_steps_taken != self._step_of_losses:
            self._num_losses, self._step_of_losses = 0, schedule.num_steps_taken
        self._num_losses += 1
        if self._has_warned or self._num_losses % _PATIENCE or schedule.finished:
            return
        later = range(self._step_of_losses + 1, self._step_of_losses + self._num_losses + 1)
        if all(schedule.factor_at(step) == schedule.factor for step in later):
            return
        self._has_warned = True
        warnings.warn(
            f"KLWeightedELBO: {self._num_losses} losses were evaluated while "
            f"{type(schedule).__name__} stood still at step {self._step_of_losses}, with the "
            f"factor {schedule.factor:g}. Call schedule.step() after each optimiser step, or train "
            "with EagerSVI.run or CompiledSVI.run, which call it for you.",
            stacklevel=stacklevel,
        )

    def _weighted(self, programs: Programs) -> Programs:
        _check_linear(self.elbo)
        pair, weighted = self._memory
        if not programs.is_same_pair(pair):
            selection = select_sites(self.sites, programs)
            in_model, in_guide = (
                _KLWeight(selection, self.schedule, is_guide) for is_guide in (False, True)
            )
            # Estimators recognise model and guide by identity, so the weighted ones are kept.
            pair = programs.without_arguments
            weighted = pair.each_under(in_model, in_guide)
            self._memory = pair, weighted
        return weighted

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("KLWeightedELBO does not trace. Use its elbo.")


class _KLWeight(Messenger):
    """A handler that multiplies the scale of some latent sites by a schedule's factor.

    ``poutine.scale`` does not accept a factor of zero, and would also scale observed sites.
    """

    def __init__(self, selection: SiteSelection, schedule: KLSchedule, is_guide: bool) -> None:
        super().__init__()
        self.selection = selection
        self.schedule = schedule
        self.is_guide = is_guide

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if self.is_guide:
            self.selection.add(msg)
        name = str(msg["name"])
        # A latent site that only the model has is enumerated, and has no KL term.
        if self.selection.is_weighted.get(name, False):
            # The factor is a tensor, so that a captured graph follows the schedule. It has the
            # dtype of the density, because float64 would widen a density without dims.
            dtype = self.selection.dtypes.get(name, torch.get_default_dtype())
            msg["scale"] = msg["scale"] * self.schedule.factor_tensor.to(dtype)


def _check_linear(elbo: Any) -> None:
    """Raise an error unless an objective is an ELBO that is linear in log p - log q."""
    check_type("KLWeightedELBO", "elbo", elbo, ELBO, "an ELBO")
    name = type(elbo).__name__
    if isinstance(elbo, MultiSampleELBO):
        if not elbo.is_linear:
            raise ValueError(
                f"KLWeightedELBO: {name} must have num_particles=1, but it has "
                f"{elbo.num_particles}. With more particles, its bound is not linear in the log "
                "weights and has no KL term to multiply."
            )
        return
    linear = Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
    # Jit objectives would freeze the factor. The tail-adaptive objective is not linear.
    others = (
        JitTrace_ELBO,
        JitTraceEnum_ELBO,
        JitTraceGraph_ELBO,
        JitTraceMeanField_ELBO,
        TraceTailAdaptive_ELBO,
    )
    if not isinstance(elbo, linear) or isinstance(elbo, others):
        raise ValueError(
            f"KLWeightedELBO: {name} is not an objective that is linear in log p - log q and "
            "traced at each step. Use Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, "
            "TraceEnum_ELBO, or one of pyro_ext with num_particles=1."
        )
