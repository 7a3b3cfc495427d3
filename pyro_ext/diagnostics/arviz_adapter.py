"""Both generations of ArviZ, 0.23 and 1.x, behind a few functions of numpy arrays and labels.

It imports neither torch nor Pyro, so that it can be tested where they are not installed.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Groups whose arrays have one value for each observation, rather than for each draw.
DATA_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")


def arviz() -> Any:
    """The installed ArviZ; imported late, for its import is slow and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import arviz
        except ImportError as error:
            raise ImportError(
                "pyro_ext.diagnostics needs ArviZ: pip install 'arviz>=0.23'"
            ) from error

    return arviz


def has_data_tree() -> bool:
    """Whether it is of the generation whose container is a DataTree."""
    return int(arviz().__version__.split(".")[0]) >= 1


def to_container(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> Any:
    """An InferenceData (ArviZ 0.23) or DataTree (1.x).

    :param groups: from the name of a group to its variables. Those of :data:`DATA_GROUPS` have no
        sample dims, others have ``(chain, draw)`` on the left; a variable that is a pair has the
        dims that it names.
    :param dims: from the name of a variable to those of its dims but the sample dims; dims that
        have no name are called ``<variable>_dim_<i>``.
    :param coords: from the name of a dim to its labels; integers where there are none, and in
        groups of predictions where they do not fit.
    :param attributes: of each group.
    """
    import xarray as xr

    datasets = {
        name: _dataset(name, variables, dims, coords, attributes)
        for name, variables in groups.items()
        if variables
    }
    if has_data_tree():
        return xr.DataTree.from_dict(datasets)
    return arviz().InferenceData(**datasets)


def _dataset(
    group: str,
    variables: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> Any:
    import xarray as xr

    arrays = {}
    sizes: dict[str, int] = {}
    for name, variable in variables.items():
        sample_dims: tuple[str, ...] = () if group in DATA_GROUPS else ("chain", "draw")
        own, values = tuple(dims.get(name, ())), variable
        if isinstance(variable, tuple):
            sample_dims, (own, values) = (), variable
        shape = values.shape[len(sample_dims) :]
        if len(own) > len(shape):
            raise ValueError(
                f"dims of '{name}': expected at most {len(shape)} names for the shape {shape}, got "
                f"{list(own)}."
            )
        unnamed = (f"{name}_dim_{i}" for i in range(len(own), len(shape)))
        names = (*sample_dims, *own, *unnamed)
        for dim, size in zip(names, values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"dim '{dim}': expected one size in a group, got {sizes[dim]} and {size} (in "
                    f"'{name}'). Give one of them another name by dims=."
                )
        arrays[name] = (names, values)
    labels = {}
    for dim, size in sizes.items():
        labels[dim] = np.asarray(coords.get(dim, np.arange(size)))
        if len(labels[dim]) != size:
            if not group.startswith("predictions"):
                found = len(labels[dim])
                raise ValueError(f"coords of '{dim}': expected {size} labels, got {found}.")
            labels[dim] = np.arange(size)
    return xr.Dataset(arrays, labels, dict(attributes))


def group(container: Any, name: str) -> Any:
    """A group as a Dataset, of either container.

    :raises ValueError: if there is none.
    """
    has_it = name in container.children if has_data_tree() else hasattr(container, name)
    if not has_it:
        raise ValueError(f"expected a group '{name}' in the data, got {group_names(container)}.")
    found = container[name]
    return found.to_dataset() if has_data_tree() else found


def group_names(container: Any) -> list[str]:
    """The names of the groups of either container."""
    return list(container.children) if has_data_tree() else list(container.groups())


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights, normalised, and the Pareto k, over the last axis.

    :param numpy.ndarray log_weights: unnormalised log weights, ``(..., S)``.
    """
    # Weights that differ by rounding have a tail of nothing else.
    spread = np.ptp(log_weights, axis=-1)
    is_constant = spread <= 1e-6 * np.maximum(1, np.abs(log_weights).max(-1))
    log_weights = np.where(is_constant[..., None], 0.0, log_weights)
    if has_data_tree():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from arviz_stats.base import array_stats
        by_row = log_weights.reshape(-1, log_weights.shape[-1])
        rows = [_psis_of_row(array_stats, row) for row in by_row]
        smoothed = np.reshape([row for row, _ in rows], log_weights.shape)
        pareto_k = np.reshape([k for _, k in rows], is_constant.shape)
    else:
        smoothed, pareto_k = arviz().psislw(log_weights)
    return np.asarray(smoothed), np.where(is_constant, 0.0, pareto_k)


def _psis_of_row(array_stats: Any, log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """By ArviZ 1.x, which raises where 0.23 leaves the weights and has a k of infinity."""
    try:
        # This generation takes the log-likelihood, minus the log weight.
        smoothed, pareto_k = array_stats.psislw(-log_weights)
    except ValueError:  # fewer than five draws in the tail, or none that differ
        return log_weights - np.logaddexp.reduce(log_weights), np.inf
    return smoothed, float(pareto_k)


def elpd_data(elpd_i: Any, p_loo: float, pareto_k: Any, num_samples: int) -> Any:
    """What ``arviz.loo(..., pointwise=True)`` returns, of the installed generation.

    :param elpd_i: a DataArray of expected log pointwise predictive densities.
    :param float p_loo: the effective number of parameters.
    :param pareto_k: a DataArray of the same shape.
    :param int num_samples: the number of draws.
    """
    good_k = min(1 - 1 / np.log10(num_samples), 0.7)
    values = {
        "elpd": float(elpd_i.sum()),
        "se": float((elpd_i.size * elpd_i.var()) ** 0.5),
        "p": p_loo,
        "n_samples": num_samples,
        "n_data_points": elpd_i.size,
        "warning": bool((pareto_k > good_k).any()),
        "elpd_i": elpd_i,
        "pareto_k": pareto_k,
        "scale": "log",
        "good_k": good_k,
    }
    if has_data_tree():
        from arviz_stats import utils

        # Early 1.x has one class for every kind.
        kind = {} if hasattr(utils, "ELPDDataLOO") else {"kind": "loo"}
        return getattr(utils, "ELPDDataLOO", utils.ELPDData)(**kind, **values)
    values["elpd_i"] = elpd_i.rename("loo_i")
    names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
    index = [names.get(name, name) for name in values]
    return arviz().stats.ELPDData(data=list(values.values()), index=index)
