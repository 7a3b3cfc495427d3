from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI

from pyro_ext._arguments import describe
from pyro_ext._deprecated import renamed_arguments
from pyro_ext.diagnostics.arviz_adapter import arviz, to_container
from pyro_ext.diagnostics.draw_source import CannotDrawError, DrawSource, draw_source
from pyro_ext.diagnostics.predictions import draw_predictions
from pyro_ext.diagnostics.sample_statistics import resample_draws, sample_statistics
from pyro_ext.diagnostics.site_arrays import Groups
from pyro_ext.infer.annealing.posterior_draws import DrawnGuide, PosteriorDraws
from pyro_ext.tracing import Program, Programs
from pyro_ext.tracing.arguments import NOT_GIVEN, is_svi, read_programs

NAME = "from_pyro_svi"
_DRAWN_GROUPS = ("prior", "posterior_predictive", "predictions")


@renamed_arguments(svi="model", batch_size="chunk_size")
def from_pyro_svi(
    model: Program | SVI | list[Any],
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    prior: bool | Mapping[str, Any] = True,
    posterior_predictive: bool | Mapping[str, Any] = True,
    log_likelihood: bool = True,
    discrete_sites: bool = True,
    predictions: Sequence[Any] | Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    resample: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Any:
    r"""Convert a fit by SVI to the data container of ArviZ.

    .. math:: w \propto \frac{p(x, z)}{q(z)},

    The groups are ``posterior``, ``posterior_predictive``, ``log_likelihood``, ``prior``,
    ``prior_predictive``, ``observed_data``, ``constant_data``, ``predictions`` and
    ``sample_stats``. ``posterior`` has the draws of the guide and the deterministic sites of model
    and guide, and also the sites that a reparameteriser of Pyro replaced. An observed site whose
    value depends on the draws is no data: it has a log-likelihood only, and a warning names it.
    ``log_likelihood`` has one value for each observation. ``sample_stats`` has ``log_p``, ``log_q``
    and ``log_weight`` of each draw, and the Pareto k of all draws. The weight w above is the
    importance weight of a draw. It leaves out a user's scale that is the same at every site, and
    sites that the guide observes.

    If plates enclose all random sites, such as the local latents of a VAE, these plates are the
    common plates. ``sample_stats`` then has ``log_weight_local`` and ``pareto_k_local`` for each of
    their elements. The dims have the names of the plates. If a plate is subsampled, its rows are
    visited block by block, so that its dim has all rows.

    Sites of the model that are marked for enumeration, and not in the guide, are summed out of the
    weights and of the log-likelihood. ``posterior`` has draws of these sites given the draws of the
    guide, and the predictions use them. Observed sites that share such a site, as in a hidden
    Markov model, have one joint log-likelihood, with the name of the first of them.

    With ``resample="psis"``, the draws are resampled with their Pareto-smoothed importance weights.
    Each element of the common plates is resampled separately. Without common plates, the draws are
    resampled jointly. Resampling corrects the guide's error if the Pareto k is below 0.7. After
    resampling by elements, the container leaves out results that do not exist for a single element:
    deterministic sites outside the common plates, and the joint ``log_p``, ``log_q`` and
    ``log_weight``.

    The result of :func:`~pyro_ext.infer.sequential_monte_carlo`, in the place of the guide, is
    exported with one chain for each run. ``sample_stats`` then has only ``log_p``.

    Under a process group of ``torch.distributed``, each process makes all draws by itself.

    :param model: a trained SVI, or the model: a callable with Pyro primitives. It may also be a
        list of SVIs or (model, guide) tuples, one per chain.
    :param guide: the guide, or a :class:`~pyro_ext.infer.PosteriorDraws`. Leave it out after an SVI
        or a list.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_samples: the number of draws of each chain, >= 2. A run has no more draws than its
        particles.
    :param prior: whether to draw from the prior; or a dict from site name to an array
        ``(draw, ...)``.
    :param posterior_predictive: whether to draw observations; or a dict from site name to an array
        ``(draw, ...)``.
    :param log_likelihood: whether to export the log-likelihood.
    :param discrete_sites: whether to export the draws of the sites that are summed out.
    :param predictions: the positional arguments of the model for new data. For other keyword
        arguments as well, pass a tuple of the positional arguments and a dict of the keyword
        arguments. For each posterior draw, the model draws new observations. It also draws the
        latent sites in the plates of the observations. You can also pass a dict from site name to
        an array ``(draw, ...)``.
    :param constant_data: a dict from a name of your choice to an array.
    :param coords: a dict from the name of a dim to its labels.
    :param dims: a dict from site name to the names of the site's dims. Give the names of the event
        dims only, or of all dims except chain and draw. In the second case they replace the names
        of the plates. By default, event dims are called ``<site>_dim_<i>``.
    :param resample: None, or ``"psis"`` to resample the draws.
    :param chunk_size: the number of draws at once, >= 1; by default all draws, but at most 100. If
        the programs cannot take the extra dim of vectorised draws, the default is 1, with a
        warning.
    :param kwargs: further keyword arguments of model and guide.
    :returns: an :class:`arviz.InferenceData`, or a :class:`xarray.DataTree` with ArviZ 1.x.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an SVI has not been trained, if arguments are out of range or do not fit
        the programs, if nothing is observed, if the model cannot draw its observations, if the
        sites are not the same in every draw, if draws are mixed, or if draws are NaN.
    :raises ImportError: if ArviZ is not installed.

    Sources: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling;
    Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
    Inference.

    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> found = from_pyro_svi(model, AutoNormal(model), torch.ones(3))
    >>> found["posterior"]["loc"].dims, found["log_likelihood"]["x"].dims
    (('chain', 'draw'), ('chain', 'draw', 'data'))
    """
    arviz()
    if resample not in (None, "psis"):
        raise ValueError(
            f"{NAME}: resample must be None or 'psis', but it is {describe(resample)}."
        )
    runs = _runs(model, guide)
    if isinstance(model, list) and guide is not NOT_GIVEN:
        args = (guide, *args)
    is_drawn = isinstance(guide, PosteriorDraws)
    num_samples = min(num_samples, guide.guides[0].num_draws) if is_drawn else num_samples
    chains = []
    for run in runs:
        programs = read_programs(NAME, *run, args, kwargs, model_args, model_kwargs)
        source = draw_source(NAME, programs, num_samples, chunk_size)
        chain = _posterior(source, num_samples, posterior_predictive is True, resample)
        if predictions is not None and not isinstance(predictions, Mapping):
            new = _with_arguments(programs, predictions)
            chain["predictions"] = draw_predictions(new, chain, source.chunk_size)
        if prior is True:
            chain |= source.draw_prior(num_samples)
        chains.append(chain)
    left_out = set() if discrete_sites else source.summed_out
    groups, names = _stack(chains, dims or {}, left_out)
    if not log_likelihood:
        groups.pop("log_likelihood")
    given = (prior, posterior_predictive, predictions)
    for group, arrays in zip(_DRAWN_GROUPS, given, strict=True):
        if isinstance(arrays, Mapping):
            groups[group] = {name: _as_array(values)[None] for name, values in arrays.items()}
    if constant_data is not None:
        groups["constant_data"] = {name: _as_array(v) for name, v in constant_data.items()}
    attributes = {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "sampling": "sequential Monte Carlo" if is_drawn else "variational",
        "resample": resample or "none",
        "common_plates": list(source.common),
    }
    return to_container(groups, names, dict(coords or {}), attributes)


def _runs(model: Any, guide: Any) -> list[tuple[Any, Any]]:
    """Return the model and guide, or the SVI, of each chain."""
    if isinstance(guide, PosteriorDraws):
        return [(model, of_run) for of_run in guide.guides]
    if not isinstance(model, list):
        return [(model, guide)]
    runs = [run if isinstance(run, tuple) else (run, NOT_GIVEN) for run in model]
    if any(given is NOT_GIVEN and not is_svi(run) for run, given in runs):
        raise TypeError(
            f"{NAME}: a list must hold one SVI, or one tuple of model and guide, for each chain. "
            "Pass a single model and guide without a list."
        )
    return runs


def _posterior(
    source: DrawSource, num_samples: int, predictive: bool, resample: str | None
) -> Groups:
    """Return the draws of the guide with their statistics, resampled if requested."""
    try:
        groups = source.draw(num_samples, predictive=predictive)
    except CannotDrawError as error:
        error.add_note("Pass posterior_predictive=False and prior=False.")
        raise
    if not groups["log_p"].keys() - groups["posterior"].keys():
        raise ValueError(f"{NAME}: the model has no observed site. Observe a site with obs=.")
    statistics = sample_statistics(groups, source.common)
    if resample:
        resample_draws(groups, statistics, source.common)
    if isinstance(source.programs.guide, DrawnGuide):  # its density is not that of the draws
        statistics = {"log_p": statistics["log_p"]}
    groups["sample_stats"] = statistics
    return groups


def _with_arguments(programs: Programs, predictions: Sequence[Any]) -> Programs:
    """Return the programs with the arguments for new data."""
    if len(predictions) == 2 and isinstance(predictions[0], tuple):
        return replace(programs, args=predictions[0], kwargs=dict(predictions[1]))
    return replace(programs, args=tuple(predictions))


def _stack(
    chains: Sequence[Groups], dims: Mapping[str, Sequence[str]], left_out: set[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Sequence[str]]]:
    """Return the arrays of all chains, without some sites, and the names of their dims."""
    groups: dict[str, dict[str, Any]] = {}
    names: dict[str, Sequence[str]] = dict(dims)
    for group, sites in chains[0].items():
        if group in ("log_p", "log_q", "is_unmasked", "has_data"):
            continue
        groups[group] = {}
        for site, array in sites.items():
            if group == "posterior" and site in left_out:
                continue
            if group == "observed_data":
                groups[group][site] = array.values[0]
            else:
                values = np.stack([chain[group][site].values for chain in chains])
                groups[group][site] = values
                if group == "log_likelihood":  # has no event dims
                    groups[group][site] = (("chain", "draw", *array.plates), values)
                if site.startswith("pareto_k"):
                    groups[group][site] = (("chain", *array.plates), values)
            own = tuple(dims.get(site, ()))
            num_events = array.values.ndim - 1 - len(array.plates)
            names[site] = (*array.plates, *own) if len(own) <= num_events else own
    return groups, names


def _as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)
