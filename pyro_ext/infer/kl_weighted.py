from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
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
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext.infer.handlers import is_delta, is_masked_out
from pyro_ext.infer.kl_schedules import KLSchedule
from pyro_ext.infer.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.program_memory import ProgramPair
from pyro_ext.ops.random_state import get_random_state, set_random_state

Sites = str | Collection[str] | Callable[[str], bool]


class KLWeightedELBO(ELBO):
    r"""An ELBO whose KL term is multiplied by a factor that follows a schedule.

    .. math:: \mathrm{loss} = -\mathbb{E}_q \bigl[ \log p(x \mid z)
        + \mathrm{factor} \cdot (\log p(z) - \log q(z)) \bigr]

    The factor multiplies the terms of the chosen latent sites, in model and guide. It is that of
    the schedule's current step, and evaluating a loss does not advance the schedule. The plain
    loss, at factor 1, is that of :attr:`elbo`.

    Sources: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), Weight Uncertainty in Neural
    Networks, section 3.4; Bowman et al. (2016), Generating Sentences from a Continuous Space.

    :param ELBO elbo: an objective that is linear in log p - log q: Pyro's ``Trace_ELBO``,
        ``TraceMeanField_ELBO``, ``TraceGraph_ELBO`` or ``TraceEnum_ELBO`` with any number of
        particles, or a :class:`MultiSampleELBO` with one.
    :param KLSchedule schedule: the factor at each step; of this objective alone.
    :param sites: which latent sites. ``"global"`` for those that several data points share: those
        outside of some plate of each observed site, or all where no observed site has a plate.
        ``"all"``, for warm-ups of models with local latent variables. Or a collection of names,
        or a function from a name to a bool. Auxiliary sites of the guide follow the sites that
        they are for.
    :raises ValueError: if ``elbo`` is not linear, if the schedule belongs to another objective;
        when run, if ``sites`` matches no latent site, or if the guide draws sites that are
        weighted together with others that are not.

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
        if not isinstance(schedule, KLSchedule):
            raise ValueError(f"KLWeightedELBO: expected a KLSchedule, got {schedule!r}.")
        if isinstance(sites, str) and sites not in ("global", "all"):
            raise ValueError(
                "KLWeightedELBO: expected sites to be 'global', 'all', a collection of names or a "
                f"function of a name, got {sites!r}."
            )
        if schedule.is_in_use:
            raise ValueError(
                "KLWeightedELBO: expected a schedule of its own, got one that belongs to another "
                "KLWeightedELBO: stepped for both, it would advance twice as fast."
            )
        super().__init__()
        self.num_particles = elbo.num_particles
        #: The plain objective; its loss is the one at factor 1.
        self.elbo: Any = elbo
        self.schedule = schedule
        self.sites = sites
        self._memory = _WeightedPair()
        schedule.is_in_use = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": _WeightedPair()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.schedule.is_in_use = True

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss at the current factor.

        :param model: the model, a callable with Pyro primitives.
        :param guide: the guide, likewise.
        :param args: passed to both, as are ``kwargs``.
        """
        pair = self._weighted(model, guide, args, kwargs)
        return self.elbo.loss(pair.weighted_model, pair.weighted_guide, *args, **kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, as :meth:`loss`, that also adds its gradients to ``.grad``."""
        pair = self._weighted(model, guide, args, kwargs)
        return self.elbo.loss_and_grads(pair.weighted_model, pair.weighted_guide, *args, **kwargs)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a tensor, for objectives that have it."""
        pair = self._weighted(model, guide, args, kwargs)
        return self.elbo.differentiable_loss(
            pair.weighted_model, pair.weighted_guide, *args, **kwargs
        )

    def _weighted(
        self, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "_WeightedPair":
        _check_linear(self.elbo)
        if not self._memory.is_of(model, guide):
            selection = _select(self.sites, *_probe(model, guide, args, kwargs))
            in_model, in_guide = (
                _KLWeight(selection, self.schedule, is_guide) for is_guide in (False, True)
            )
            # Estimators remember their programs by identity.
            self._memory = _WeightedPair(model, guide, in_model(model), in_guide(guide))
        return self._memory

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("KLWeightedELBO leaves tracing to its elbo.")


@dataclass
class _WeightedPair(ProgramPair):
    """A pair of programs, and the same with weighted sites."""

    weighted_model: Any = field(default=None, repr=False)
    weighted_guide: Any = field(default=None, repr=False)


@dataclass
class _Selection:
    """Which latent sites are weighted."""

    choose: Callable[[str, Any], bool]
    is_weighted: dict[str, bool] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, site: Any) -> None:
        """Decides about a site of the guide, if it is not one of the first run's."""
        name = site["name"]
        if name not in self.is_weighted:
            stem = _stem(name)
            self.is_weighted[name] = self.is_weighted.get(stem, self.choose(stem, site))


class _KLWeight(Messenger):
    """Multiplies the scale of some latent sites by a schedule's factor.

    ``poutine.scale`` refuses a factor of zero and would scale observed sites as well.
    """

    def __init__(self, selection: _Selection, schedule: KLSchedule, is_guide: bool) -> None:
        super().__init__()
        self.selection = selection
        self.schedule = schedule
        self.is_guide = is_guide

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if self.is_guide:
            self.selection.add(msg)
        # A site of the model alone is enumerated, and has no KL term.
        if self.selection.is_weighted.get(msg["name"], False):
            # A tensor, for graphs captured from a step to follow it; in the dtype of the density,
            # which float64 would widen where it has no dims either.
            dtype = self.selection.dtypes.get(msg["name"], torch.get_default_dtype())
            msg["scale"] = msg["scale"] * self.schedule.factor_tensor.to(dtype)


def _check_linear(elbo: Any) -> None:
    """Raises a ValueError unless an objective is linear in log p - log q."""
    name = type(elbo).__name__
    if isinstance(elbo, MultiSampleELBO):
        if elbo.num_particles > 1:
            raise ValueError(
                f"KLWeightedELBO: expected {name} to have num_particles=1, got "
                f"{elbo.num_particles}: with more its bound is not linear in the log weights, so "
                "that it has no KL term to multiply."
            )
        return
    linear = Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
    # Jit objectives would freeze the factor; the tail-adaptive one is not linear.
    others = (
        JitTrace_ELBO,
        JitTraceEnum_ELBO,
        JitTraceGraph_ELBO,
        JitTraceMeanField_ELBO,
        TraceTailAdaptive_ELBO,
    )
    if not isinstance(elbo, linear) or isinstance(elbo, others):
        raise ValueError(
            "KLWeightedELBO: expected an objective that is linear in log p - log q and traced at "
            "each step (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, or one "
            f"of pyro_ext with num_particles=1), got {name}."
        )


def _probe(
    model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, Trace]:
    """Traces of one run that leaves the random numbers as they were."""
    state = get_random_state()
    try:
        with poutine.block(), torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
            guide_trace.compute_log_prob()
            return model_trace, guide_trace
    finally:
        set_random_state(state)


def _select(sites: Sites, model_trace: Trace, guide_trace: Trace) -> _Selection:
    """The sites that are weighted, among those of a run and among others to come."""
    drawn = {
        name: node
        for name, node in guide_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }
    latent = [name for name in drawn if name in model_trace.nodes]
    choose = _chooser(sites, model_trace, list(drawn))
    selection = _Selection(choose, {name: choose(name, drawn[name]) for name in latent})
    if not any(selection.is_weighted.values()) and sites != "all":
        raise ValueError(
            f"KLWeightedELBO: expected sites={sites!r} to match latent sites, of which the guide "
            f"has {latent}, and it matches none. sites='all' is for local latent variables."
        )
    auxiliary = [name for name in drawn if name not in model_trace.nodes]
    joint = [name for name in auxiliary if _stem(name) not in latent]
    if joint:
        _select_joint(joint, auxiliary, latent, drawn, selection)
    for name, node in drawn.items():
        selection.add(node)
        selection.dtypes[name] = node["log_prob"].dtype
    return selection


def _select_joint(
    joint: list[str],
    auxiliary: list[str],
    latent: list[str],
    drawn: dict[str, Any],
    selection: _Selection,
) -> None:
    """Adds the auxiliary sites that may be drawn for several latent sites."""
    apart = {_stem(name) for name in auxiliary}
    together = [name for name in latent if is_delta(drawn[name]["fn"]) and name not in apart]
    weights = {selection.is_weighted[name] for name in together or latent}
    if together and len(weights) > 1:
        weighted = [name for name in together if selection.is_weighted[name]]
        raise ValueError(
            f"KLWeightedELBO: the guide's site '{joint[0]}' may draw sites that are weighted, "
            f"{weighted}, together with others, {sorted(set(together) - set(weighted))}: expected "
            "a guide that draws them apart, or sites='all'."
        )
    for name in joint:
        are_all = weights == {True} or weights == {False}
        selection.is_weighted[name] = (
            weights == {True} if are_all else selection.choose(name, drawn[name])
        )


def _stem(name: str) -> str:
    """The latent site that an autoguide's auxiliary site is for."""
    return name.removesuffix("_unconstrained").removesuffix("_aux")


def _chooser(sites: Sites, model_trace: Trace, latent: list[str]) -> Callable[[str, Any], bool]:
    """The function from a name and a site to whether the site is weighted."""
    if callable(sites):
        return lambda name, site: bool(sites(name))
    if sites == "all":
        return lambda name, site: True
    if not isinstance(sites, str):
        names = set(sites)
        unknown = sorted(names - set(latent))
        if unknown:
            raise ValueError(
                f"KLWeightedELBO: expected sites to name latent sites, of which the guide has "
                f"{latent}, got {unknown} among them."
            )
        return lambda name, site: name in names
    observed = [
        node
        for node in model_trace.nodes.values()
        if node["type"] == "sample" and node["is_observed"] and not is_masked_out(node)
    ]
    # A factor may be a term of the prior.
    data = [node for node in observed if not isinstance(node["fn"], Unit)] or observed
    data_plates = [_plates(node) for node in data]
    return lambda name, site: not any(plates and plates <= _plates(site) for plates in data_plates)


def _plates(node: Any) -> frozenset[str]:
    return frozenset(frame.name for frame in node["cond_indep_stack"])
