import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pyro
from scipy.special import softmax

from pyro_ext._arguments import check_integer, check_real, check_type, describe
from pyro_ext.diagnostics.arviz_adapter import elpd_and_error
from pyro_ext.diagnostics.loo import loo
from pyro_ext.diagnostics.observed_data import ObservedData, check_same_data, observed_data
from pyro_ext.infer.annealing.sequential_monte_carlo import sequential_monte_carlo
from pyro_ext.infer.evidence.estimate_evidence import estimate_evidence
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.tracing import Programs
from pyro_ext.tracing.arguments import NOT_GIVEN, is_svi, read_programs

NAME = "compare_models"
NUM_SIMULATIONS = 20_000
#: The settings of all estimates with a guide.
SETTINGS = {
    name
    for name, parameter in inspect.signature(estimate_evidence).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
} - {"model_args", "model_kwargs", "data_loader", "state"}


def compare_models(
    models: Mapping[str, Any],
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    prior_probabilities: Mapping[str, float] | None = None,
    interval: float = 0.95,
    with_loo: bool = True,
    scopes: Mapping[str, Any] | None = None,
    evidence_kwargs: Mapping[str, Any] | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> Any:
    r"""Compare models by their evidence, in a table with one row for each model.

    .. math::

        P(M_i \mid x) = \frac{p(x \mid M_i) \, P(M_i)}{\sum_j p(x \mid M_j) \, P(M_j)}, \qquad
        \log \mathrm{BF}_i = \log p(x \mid M_i) - \max_j \log p(x \mid M_j)

    The errors of the log evidences are taken as independent and normal. The interval of a
    probability is that of 20,000 simulations of these errors. It describes Monte Carlo noise, so
    more draws make it shorter. An estimate with flags may be off by more than its error. Parameters
    of a model outside of its guide are point estimates from the same data, for which the evidence
    has no penalty.

    The table is a :class:`pandas.DataFrame`. Its index holds the names of the models, the one with
    the highest log evidence first. Its columns are:

    - ``log_evidence`` and ``std_error``: the total over all data points, in nats;
    - ``log_bayes_factor`` and ``log_bayes_factor_std_error``: against the first row, in nats;
    - ``probability``, ``probability_low`` and ``probability_high``: the posterior probability of
      the model, and its interval;
    - ``flags``: the names of :attr:`pyro_ext.infer.Evidence.flags`, separated by commas;
    - ``elpd_loo`` and ``se``: the expected log predictive density of :func:`loo` with its standard
      error, in nats; NaN where it is not defined.

    :param models: a dict from the name of a model to a trained SVI, to a pair ``(model, guide)``,
        to a model alone, or to an :class:`pyro_ext.infer.Evidence` or a result with the attribute
        ``evidence``. If the guide is None or missing, the evidence comes from
        :func:`pyro_ext.infer.sequential_monte_carlo`, otherwise from
        :func:`pyro_ext.infer.estimate_evidence`.
    :param args: positional arguments of models and guides.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of models and guides whose names clash with arguments of
        this function.
    :param num_samples: the number of draws of each guide, >= 2.
    :param chunk_size: the number of draws at once, >= 1; by default all draws, but at most 100.
    :param prior_probabilities: a dict from the name of each model to its prior probability in [0,
        1]. The probabilities sum to 1. With None, they are equal.
    :param interval: the probability of the intervals, between 0 and 1.
    :param with_loo: whether to call :func:`loo`, which makes draws of its own.
    :param scopes: a dict from the name of a model to the scope of the parameter store in which it
        was trained, such as ``scope`` after ``with pyro.get_param_store().scope() as scope``.
        Guides whose parameters have the same names need it.
    :param evidence_kwargs: further arguments of :func:`pyro_ext.infer.estimate_evidence` for every
        guide, such as ``proposal_scale``, or ``data_plate`` with ``batch_size``.
    :param progress_bar: whether to show progress bars.
    :param kwargs: further keyword arguments of models and guides.
    :returns: the table. :func:`plot_model_comparison` plots it.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if there are no models, if two models observe different sites, another
        number of values or other values, if a plate is subsampled and ``evidence_kwargs`` has no
        ``batch_size``, if ``prior_probabilities`` or ``scopes`` do not fit the models, and in the
        cases of :func:`pyro_ext.infer.estimate_evidence`.
    :raises ImportError: if pandas, or with ``with_loo`` also ArviZ, is not installed.

    Source: Kass and Raftery (1995), Bayes Factors.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model(x, scale):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, scale))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> def narrow(x):
    ...     model(x, 1.0)
    >>> def wide(x):
    ...     model(x, 10.0)
    >>> def guide(x):
    ...     pyro.sample("loc", dist.Normal(x.mean(), 0.6))
    >>> pyro.set_rng_seed(0)
    >>> found = compare_models({"wide": (wide, guide), "narrow": (narrow, guide)}, torch.ones(3))
    >>> found["log_bayes_factor"].round(1).to_dict()
    {'narrow': 0.0, 'wide': -1.8}
    """
    check_type(NAME, "models", models, Mapping, "a dict from names to models")
    if not models:
        raise ValueError(f"{NAME}: models is empty. Pass at least one model.")
    check_real(NAME, "interval", interval, 0.0, 1.0)
    log_prior = _log_prior(list(models), prior_probabilities)
    check_integer(NAME, "num_samples", num_samples, 2)
    settings = _evidence_settings(evidence_kwargs, num_samples, chunk_size, progress_bar)
    scopes = {} if scopes is None else scopes
    check_type(NAME, "scopes", scopes, Mapping, "a dict from the name of a model to its scope")
    for name, scope in scopes.items():
        check_type(
            NAME, f"the scope of model '{name}'", scope, dict, "a scope of the parameter store"
        )
    if unknown := sorted(scopes.keys() - models.keys(), key=str):
        raise ValueError(f"{NAME}: scopes has {unknown}, which are no names of models.")
    evidences = {name: given for name, x in models.items() if (given := _given_evidence(x))}
    fits = {
        name: _fit(name, models[name], args, kwargs, model_args, model_kwargs)
        for name in models
        if name not in evidences
    }
    data = {name: ObservedData(None, _sizes(evidence)) for name, evidence in evidences.items()}
    for name, fit in fits.items():
        with _scope_of(name, scopes):
            owner = f"{NAME}: model '{name}'"
            allows_subsamples = fit.guide is not None and "batch_size" in settings
            data[name] = observed_data(owner, fit.programs, allows_subsamples)
    check_same_data(NAME, {name: data[name] for name in models})
    elpds = {}
    for name, fit in fits.items():
        with _scope_of(name, scopes):
            evidences[name] = _evidence(fit, settings)
            if with_loo and fit.guide is not None:
                elpds[name] = _elpd(name, fit, num_samples, chunk_size, progress_bar)
    return _table({name: evidences[name] for name in models}, elpds, log_prior, interval)


class _Fit(NamedTuple):
    """A model or SVI, its guide (None for the prior), and both with their arguments."""

    model: Any
    guide: Any
    programs: Programs

    @property
    def call(self) -> dict[str, Any]:
        """The arguments with which to call a function that takes programs."""
        return {
            "model": self.model,
            "guide": self.guide,
            "model_args": self.programs.args,
            "model_kwargs": self.programs.kwargs,
        }


def _given_evidence(entry: Any) -> Evidence | None:
    evidence = getattr(entry, "evidence", entry)
    return evidence if isinstance(evidence, Evidence) else None


def _fit(
    name: str,
    entry: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    model_args: Sequence[Any] | None,
    model_kwargs: Mapping[str, Any] | None,
) -> _Fit:
    if is_svi(entry):
        model, guide = entry, NOT_GIVEN
    elif isinstance(entry, tuple) and len(entry) == 2:
        model, guide = entry
    elif callable(entry):
        model, guide = entry, None
    else:
        raise TypeError(
            f"{NAME}: model '{name}' must be an SVI, a pair (model, guide), a model or an "
            f"Evidence, but it is {describe(entry)}."
        )
    owner = f"{NAME}: model '{name}'"
    programs = read_programs(
        owner, model, guide, args, kwargs, model_args, model_kwargs, without_guide=PriorProposal
    )
    return _Fit(model, guide, programs)


def _sizes(evidence: Evidence) -> dict[str, int]:
    return dict(zip(evidence.plates, evidence.log_evidence.shape, strict=True))


@contextmanager
def _scope_of(name: str, scopes: Mapping[str, Any]) -> Iterator[None]:
    """Use the parameters of a model, and name it in errors."""
    try:
        with pyro.get_param_store().scope(scopes[name]) if name in scopes else nullcontext():
            yield
    except Exception as error:
        error.add_note(f"{NAME}: this happened for model '{name}'.")
        raise


def _evidence(fit: _Fit, settings: dict[str, Any]) -> Evidence:
    with warnings.catch_warnings():
        # The sum over all data is compared, so a single weight is right.
        warnings.filterwarnings("ignore", "Plate '.*' holds all the data")
        if fit.guide is None:
            names = ("chunk_size", "progress_bar")
            options = {name: settings[name] for name in names}
            return sequential_monte_carlo(**fit.call, **options).evidence
        return estimate_evidence(**fit.call, **settings)


def _elpd(
    name: str, fit: _Fit, num_samples: int, chunk_size: int | None, progress_bar: bool
) -> tuple[float, float]:
    try:
        found = loo(
            **fit.call, num_samples=num_samples, chunk_size=chunk_size, progress_bar=progress_bar
        )
    except ValueError as error:
        warnings.warn(
            f"{NAME}: elpd_loo of model '{name}' is NaN. {error} To leave it out, pass "
            "with_loo=False.",
            stacklevel=3,
        )
        return math.nan, math.nan
    return elpd_and_error(found)


def _table(
    evidences: dict[str, Evidence],
    elpds: dict[str, tuple[float, float]],
    log_prior: np.ndarray,
    interval: float,
) -> Any:
    import pandas as pd

    log_evidence = np.array([evidence.total for evidence in evidences.values()])
    std_error = np.array([evidence.total_std_error for evidence in evidences.values()])
    best = log_evidence.argmax()
    of_others = np.arange(len(log_evidence)) != best
    logits = log_evidence + log_prior
    # A generator of its own leaves the random numbers of the user as they are.
    noise = np.random.default_rng(0).standard_normal((NUM_SIMULATIONS, len(logits)))
    simulated = softmax(logits + noise * std_error, 1)
    low, high = np.quantile(simulated, [(1 - interval) / 2, (1 + interval) / 2], 0)
    elpd, se = zip(*(elpds.get(name, (math.nan, math.nan)) for name in evidences), strict=True)
    columns = {
        "log_evidence": log_evidence,
        "std_error": std_error,
        "log_bayes_factor": log_evidence - log_evidence[best],
        "log_bayes_factor_std_error": np.hypot(std_error, std_error[best]) * of_others,
        "probability": softmax(logits),
        "probability_low": low,
        "probability_high": high,
        "flags": [", ".join(evidence.flags) for evidence in evidences.values()],
        "elpd_loo": elpd,
        "se": se,
    }
    frame = pd.DataFrame(columns, index=list(evidences))
    return frame.sort_values("log_evidence", ascending=False, kind="stable")


def _log_prior(names: list[str], prior_probabilities: Mapping[str, float] | None) -> np.ndarray:
    if prior_probabilities is None:
        return np.zeros(len(names))
    expected = "a dict from the name of each model to its probability"
    check_type(NAME, "prior_probabilities", prior_probabilities, Mapping, expected)
    if wrong := sorted(prior_probabilities.keys() ^ set(names), key=str):
        raise ValueError(
            f"{NAME}: prior_probabilities must have the names of the models, but {wrong} are in "
            "one of them only."
        )
    for name, value in prior_probabilities.items():
        check_real(NAME, f"the prior probability of model '{name}'", value, 0.0, 1.0)
    values = np.array([prior_probabilities[name] for name in names])
    if abs(values.sum() - 1) > 1e-6:
        raise ValueError(
            f"{NAME}: prior_probabilities must sum to 1, but their sum is {values.sum():.6g}."
        )
    with np.errstate(divide="ignore"):
        return np.log(values)


def _evidence_settings(
    evidence_kwargs: Mapping[str, Any] | None,
    num_samples: int,
    chunk_size: int | None,
    progress_bar: bool,
) -> dict[str, Any]:
    """Return the settings of all estimates of the evidence."""
    given = {} if evidence_kwargs is None else evidence_kwargs
    check_type(NAME, "evidence_kwargs", given, Mapping, "a dict")
    for name in ("data_loader", "state"):
        if name in given:
            raise ValueError(
                f"{NAME}: evidence_kwargs has '{name}', which belongs to one model. Call "
                "estimate_evidence for each model, and pass the results."
            )
    if unknown := sorted(given.keys() - SETTINGS, key=str):
        raise ValueError(
            f"{NAME}: evidence_kwargs has {unknown}, which are no settings of estimate_evidence. "
            f"It takes {sorted(SETTINGS)}."
        )
    settings = {"num_samples": num_samples, "chunk_size": chunk_size, "progress_bar": progress_bar}
    return settings | dict(given)
