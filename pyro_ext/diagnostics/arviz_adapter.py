"""An adapter for both generations of ArviZ, 0.23 and 1.x: functions of numpy arrays and labels.

It imports neither torch nor Pyro, so it can be tested where they are not installed.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: The groups whose arrays have one value for each observation, not for each draw.
DATA_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")


def arviz() -> Any:
    """Return the installed ArviZ. It is imported late, because its import is slow and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import arviz
        except ImportError as error:
            raise ImportError(
                "pyro_ext.diagnostics: ArviZ is not installed. Run pip install 'arviz>=0.23'."
            ) from error

    return arviz


def has_data_tree() -> bool:
    """Return whether the container of the installed ArviZ is a DataTree."""
    return int(arviz().__version__.split(".")[0]) >= 1


def to_container(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> Any:
    """Return an InferenceData (ArviZ 0.23) or a DataTree (1.x).

    :param groups: a dict from the name of a group to its variables. Groups in :data:`DATA_GROUPS`
        have no sample dims, and others have ``(chain, draw)`` on the left. A variable that is a
        tuple of names and values has exactly the named dims.
    :param dims: a dict from the name of a variable to the names of its dims, without the sample
        dims. Dims without a name are called ``<variable>_dim_<i>``.
    :param coords: a dict from the name of a dim to its labels. Dims without labels get integers. In
        groups of predictions, dims whose labels do not fit get integers too.
    :param attributes: the attributes of each group.
    :returns: the container.
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
                f"from_pyro_svi: dims has {len(own)} names for '{name}', whose shape is {shape}. "
                f"Pass at most {len(shape)}."
            )
        unnamed = (f"{name}_dim_{i}" for i in range(len(own), len(shape)))
        names = (*sample_dims, *own, *unnamed)
        for dim, size in zip(names, values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"from_pyro_svi: dim '{dim}' has size {size} in '{name}', but size "
                    f"{sizes[dim]} in another variable of the group '{group}'. Give one of them "
                    "another name by dims=."
                )
        arrays[name] = (names, values)
    labels = {}
    for dim, size in sizes.items():
        labels[dim] = np.asarray(coords.get(dim, np.arange(size)))
        if len(labels[dim]) != size:
            if not group.startswith("predictions"):
                raise ValueError(
                    f"from_pyro_svi: coords has {len(labels[dim])} labels for '{dim}', whose size "
                    f"is {size}. Pass {size} labels."
                )
            labels[dim] = np.arange(size)
    return xr.Dataset(arrays, labels, dict(attributes))


def group(container: Any, name: str) -> Any:
    """Return a group of either container, as a Dataset.

    :raises ValueError: if the group does not exist.
    """
    has_it = name in container.children if has_data_tree() else hasattr(container, name)
    if not has_it:
        raise ValueError(
            f"The data have no group '{name}'. Their groups are {group_names(container)}."
        )
    found = container[name]
    return found.to_dataset() if has_data_tree() else found


def group_names(container: Any) -> list[str]:
    """Return the names of the groups of either container."""
    return list(container.children) if has_data_tree() else list(container.groups())


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return normalised, Pareto-smoothed log weights and the Pareto k, over the last axis.

    :param log_weights: unnormalised log weights of shape ``(..., S)``.
    :returns: the log weights, ``(..., S)``, and the Pareto k, ``(...)``.
    """
    # If weights differ only by rounding, a fit to their tail would have no meaning.
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
    """Return the smoothed log weights and the Pareto k of one row, with ArviZ 1.x.

    If nothing can be fitted, ArviZ 1.x raises an error. This function then returns the weights
    without smoothing and a k of infinity, like ArviZ 0.23.
    """
    try:
        # ArviZ 1.x takes the log-likelihood, which is the negative log weight.
        smoothed, pareto_k = array_stats.psislw(-log_weights)
    except ValueError:  # fewer than five draws in the tail, or all equal
        return log_weights - np.logaddexp.reduce(log_weights), np.inf
    return smoothed, float(pareto_k)


def elpd_data(elpd_i: Any, p_loo: float, pareto_k: Any, num_samples: int) -> Any:
    """Return the result type of ``arviz.loo(..., pointwise=True)`` in the installed generation.

    :param elpd_i: a DataArray of expected log pointwise predictive densities.
    :param p_loo: the effective number of parameters.
    :param pareto_k: a DataArray of the same shape.
    :param num_samples: the number of draws.
    :returns: an ``ELPDData``, or an ``ELPDDataLOO`` if the installed ArviZ has one.
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

        # Early versions of 1.x have one class for every kind.
        kind = {} if hasattr(utils, "ELPDDataLOO") else {"kind": "loo"}
        return getattr(utils, "ELPDDataLOO", utils.ELPDData)(**kind, **values)
    values["elpd_i"] = elpd_i.rename("loo_i")
    names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
    index = [names.get(name, name) for name in values]
    return arviz().stats.ELPDData(data=list(values.values()), index=index)


def elpd_and_error(found: Any) -> tuple[float, float]:
    """Return the expected log predictive density and its standard error of an ELPDData."""
    return float(found["elpd" if has_data_tree() else "elpd_loo"]), float(found["se"])
