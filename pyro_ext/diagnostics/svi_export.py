from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch

from pyro_ext.diagnostics.arviz_adapter import arviz, psis, to_container
from pyro_ext.diagnostics.draws import DrawSource
from pyro_ext.diagnostics.site_arrays import Groups, SiteArray
from pyro_ext.infer.arguments import check_integer

NAME = "from_pyro_svi"
Pair = tuple[Callable, Callable]


def from_pyro_svi(
    svi: Any,
    *,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    prior: bool | Mapping[str, Any] = True,
    posterior_predictive: bool | Mapping[str, Any] = True,
    log_likelihood: bool = True,
    predictions: Sequence[Any] | Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    resample: str | None = None,
    batch_size: int | None = None,
) -> Any:
    r"""What a guide that was fitted by SVI says, as ArviZ's container.

    The groups are ``posterior`` (draws of the guide, with deterministic sites),
    ``posterior_predictive``, ``log_likelihood`` (of each observation), ``prior``,
    ``prior_predictive``, ``observed_data``, ``constant_data``, ``predictions`` and
    ``sample_stats``, which has ``log_p``, ``log_q`` and ``log_weight`` of each draw and the Pareto
    k of all draws. Where plates are around all that is random, as for the local latents of a VAE,
    ``log_weight_local`` and ``pareto_k_local`` tell of each element of these plates. The names of
    plates are those of dims; a subsampled plate is visited block by block, until all of its rows
    are there.

    With ``resample="psis"`` draws are drawn again by their Pareto-smoothed importance weights

    .. math:: w \propto \frac{p(x, z)}{q(z)},

    for each element of the common plates by itself, jointly where there are none. That corrects
    for the guide's error where the Pareto k is below 0.7. What cannot be put together again for
    single elements is left out: deterministic sites outside of the common plates, and the joint
    ``log_p``, ``log_q`` and ``log_weight``.

    Sources: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling;
    Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
    Inference.

    :param svi: a :class:`pyro.infer.SVI` that has been stepped, or a (model, guide) pair; or a list
        of such, from several runs, to be the chains.
    :param model_args: positional arguments of model and guide.
    :param model_kwargs: keyword arguments of both.
    :param int num_samples: draws of each chain, 2 or more.
    :param prior: whether to draw from the prior; or arrays ``(draw, ...)`` by site.
    :param posterior_predictive: whether to draw observations; or arrays ``(draw, ...)`` by site.
    :param bool log_likelihood: whether to export it.
    :param predictions: positional arguments of the model for new data, or a pair of these (a
        tuple) and keyword arguments (a dict), in place of ``model_kwargs``: for each draw of the
        posterior, observations are drawn by the model, and with them the latent sites in their
        plates. Or arrays ``(draw, ...)`` by site.
    :param constant_data: arrays by name.
    :param coords: labels by name of a dim.
    :param dims: names of a site's dims, all but chain and draw, in place of the plates' names; or
        of its event dims alone, which are otherwise ``<site>_dim_<i>``.
    :param resample: None or ``"psis"``.
    :param int batch_size: how many draws run at once, vectorised unless it is 1; at most 100 by
        default.
    :returns: an :class:`arviz.InferenceData`, or a :class:`xarray.DataTree` with ArviZ 1.x.
    :raises ValueError: if an SVI has never been stepped, if arguments are out of range or do not
        fit the programs, if nothing is observed, or if draws are NaN.
    :raises ImportError: if ArviZ is missing.

    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> found = from_pyro_svi((model, AutoNormal(model)), model_args=(torch.ones(3),))
    >>> found["posterior"]["loc"].dims, found["log_likelihood"]["x"].dims
    (('chain', 'draw'), ('chain', 'draw', 'data'))
    """
    arviz()
    if resample not in (None, "psis"):
        raise ValueError(f"{NAME}: expected resample to be None or 'psis', got {resample!r}.")
    runs = svi if isinstance(svi, list) else [svi]
    chains = []
    for run in runs:
        source = draw_source(NAME, run, model_args, model_kwargs, num_samples, batch_size)
        chain = _posterior(source, num_samples, posterior_predictive is True, resample)
        if predictions is not None and not isinstance(predictions, Mapping):
            new = _new_arguments(predictions, source.kwargs)
            observed = list(chain["observed_data"])
            chain["predictions"] = source.draw_predictions(chain["posterior"], observed, *new)
        if prior is True:
            chain |= source.draw_prior(num_samples)
        chains.append(chain)
    groups, names = _stack(chains, dims or {})
    if not log_likelihood:
        groups.pop("log_likelihood")
    given = {
        "prior": prior,
        "posterior_predictive": posterior_predictive,
        "predictions": predictions,
    }
    for group, arrays in given.items():
        if isinstance(arrays, Mapping):
            groups[group] = {name: _as_array(values)[None] for name, values in arrays.items()}
    if constant_data is not None:
        groups["constant_data"] = {name: _as_array(v) for name, v in constant_data.items()}
    attributes = {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "sampling": "variational",
        "resample": resample or "none",
        "common_plates": list(source.common),
    }
    return to_container(groups, names, dict(coords or {}), attributes)


def draw_source(
    owner: str,
    svi: Any,
    model_args: Sequence[Any],
    model_kwargs: Mapping[str, Any] | None,
    num_samples: int,
    batch_size: int | None,
) -> DrawSource:
    """The programs of an SVI or pair, run once.

    :param str owner: the name of the function that asks for them, for errors.
    :param int num_samples: how many draws are planned.
    :param int batch_size: how many of them run at once; None for at most 100.
    :raises ValueError: if it has never been stepped, or if arguments do not fit the programs.
    """
    check_integer(owner, "num_samples", num_samples, 2)
    size = min(num_samples, 100) if batch_size is None else batch_size
    check_integer(owner, "batch_size", size, 1)
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    if isinstance(svi, tuple) and len(svi) == 2:
        model, guide = svi
    elif hasattr(svi, "model") and hasattr(svi, "guide"):
        model, guide = svi.model, svi.guide
        is_new = not getattr(svi.optim, "optim_objs", True)
        if is_new and len(pyro.get_param_store()) == 0:
            raise ValueError(
                f"{owner}: expected an SVI that has been stepped, got one without a step. Pass "
                "(model, guide) if that is meant."
            )
    else:
        raise ValueError(
            f"{owner}: expected an SVI or a (model, guide) pair, got {type(svi).__name__}."
        )
    try:
        return DrawSource(model, guide, args, kwargs, size)
    except TypeError as error:
        raise ValueError(
            f"{owner}: expected model_args and model_kwargs that fit the model and guide, got "
            f"{len(args)} arguments and {sorted(kwargs)}: {error}"
        ) from error
    except (RuntimeError, ValueError) as error:
        error.add_note(
            f"{owner}: if the sizes do not fit, the guide may have been fitted to other data than "
            "model_args. Programs that cannot take several draws at once run with batch_size=1."
        )
        raise


def _posterior(
    source: DrawSource, num_samples: int, predictive: bool, resample: str | None
) -> Groups:
    """Draws of the guide, drawn again if asked for, with their statistics."""
    groups = source.draw(num_samples, predictive=predictive)
    if not groups["log_p"].keys() - groups["posterior"].keys():
        raise ValueError(f"{NAME}: expected an observed site in the model, got none.")
    statistics = sample_statistics(groups, source.common)
    if resample:
        _resample(groups, statistics, source.common)
    groups["sample_stats"] = statistics
    return groups


def sample_statistics(groups: Groups, common: tuple[str, ...]) -> dict[str, SiteArray]:
    """Log-densities, log weights and their Pareto k, which has no dim of draws."""

    def total(group: str, plates: Sequence[str]) -> Any:
        terms = [
            array.sum_to(plates)
            for array in groups[group].values()
            if set(plates) <= set(array.plates)
        ]
        return sum(terms)

    log_p, log_q = total("log_p", ()), total("log_q", ())
    statistics = {
        "log_p": SiteArray((), log_p),
        "log_q": SiteArray((), log_q),
        "log_weight": SiteArray((), log_p - log_q),
    }
    if common:
        local = total("log_p", common) - total("log_q", common)
        statistics["log_weight_local"] = SiteArray(common, local)
    for name in list(statistics):
        if name.startswith("log_weight"):
            plates, values = statistics[name]
            pareto_k = psis(np.moveaxis(values, 0, -1))[1]
            statistics[name.replace("log_weight", "pareto_k")] = SiteArray(plates, pareto_k)
    return statistics


def _resample(groups: Groups, statistics: dict[str, SiteArray], common: tuple[str, ...]) -> None:
    """Draws the draws again by their smoothed weights, in place."""
    name = "log_weight_local" if common else "log_weight"
    log_weight = np.moveaxis(statistics[name].values, 0, -1)
    num_draws = log_weight.shape[-1]
    weight = np.exp(psis(log_weight)[0])
    # Systematic: one uniform number for each element.
    cumulative = np.cumsum(weight, -1).reshape(-1, num_draws)
    offsets = torch.rand(len(cumulative)).numpy()
    points = (np.arange(num_draws) + offsets[:, None]) / num_draws
    rows = zip(cumulative, points * cumulative[:, -1:], strict=True)
    chosen = np.stack([row.searchsorted(p).clip(max=num_draws - 1) for row, p in rows])
    chosen = chosen.reshape(log_weight.shape)
    order = torch.randperm(num_draws).numpy()
    index = np.moveaxis(chosen[..., order], -1, 0)
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for site, array in list(groups.get(group, {}).items()):
            if set(common) <= set(array.plates):
                groups[group][site] = SiteArray(array.plates, _take(array, index, common))
            elif group == "posterior":
                del groups[group][site]
    for name in [name for name in statistics if name.startswith("log_")]:
        if common and name != "log_weight_local":
            del statistics[name]
        else:
            array = statistics[name]
            statistics[name] = SiteArray(array.plates, _take(array, index, common))


def _take(array: SiteArray, index: np.ndarray, common: tuple[str, ...]) -> np.ndarray:
    """The draws of an array by index ``(draw, *common)``."""
    axes = [1 + array.plates.index(name) for name in common]
    shape = [1] * array.values.ndim
    for axis, size in zip([0, *axes], index.shape, strict=True):
        shape[axis] = size
    return np.take_along_axis(array.values, index.reshape(shape), 0)


def _new_arguments(
    predictions: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for new data."""
    if len(predictions) == 2 and isinstance(predictions[0], tuple):
        args, new_kwargs = predictions
        return args, dict(new_kwargs)
    return tuple(predictions), kwargs


def _stack(
    chains: Sequence[Groups], dims: Mapping[str, Sequence[str]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Sequence[str]]]:
    """The arrays of all chains, and the names of their dims."""
    groups: dict[str, dict[str, Any]] = {}
    names: dict[str, Sequence[str]] = dict(dims)
    for group, sites in chains[0].items():
        if group in ("log_p", "log_q", "is_unmasked"):
            continue
        groups[group] = {}
        for site, array in sites.items():
            if group == "observed_data":
                groups[group][site] = array.values[0]
            else:
                values = np.stack([chain[group][site].values for chain in chains])
                groups[group][site] = values
                if site.startswith("pareto_k"):
                    groups[group][site] = (("chain", *array.plates), values)
            own = tuple(dims.get(site, ()))
            num_events = array.values.ndim - 1 - len(array.plates)
            names[site] = (*array.plates, *own) if len(own) <= num_events else own
    return groups, names


def _as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)
