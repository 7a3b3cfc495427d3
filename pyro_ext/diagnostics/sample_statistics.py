"""Log weights of draws with their Pareto k, and the resampling of draws by their weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyro_ext.diagnostics.arviz_adapter import psis
from pyro_ext.diagnostics.site_arrays import Groups, SiteArray


def sample_statistics(groups: Groups, common: tuple[str, ...]) -> dict[str, SiteArray]:
    """Return log-densities, log weights and their Pareto k. The Pareto k has no dim of draws."""

    def total(group: str, plates: Sequence[str]) -> Any:
        arrays = [a for a in groups[group].values() if set(plates) <= set(a.plates)]
        return sum(array.sum_to(plates) for array in arrays)

    log_p = total("log_p", ())
    log_q = np.zeros_like(log_p) + total("log_q", ())  # a guide may have no sites
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


def resample_draws(
    groups: Groups, statistics: dict[str, SiteArray], common: tuple[str, ...]
) -> None:
    """Resample the draws with their smoothed weights, in place."""
    name = "log_weight_local" if common else "log_weight"
    log_weight = np.moveaxis(statistics[name].values, 0, -1)
    num_draws = log_weight.shape[-1]
    weight = np.exp(psis(log_weight)[0])
    # Systematic resampling needs one uniform number for each element.
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
                groups[group][site] = _take(array, index, common)
            elif group == "posterior":
                del groups[group][site]
    for name in [name for name in statistics if name.startswith("log_")]:
        if common and name != "log_weight_local":
            del statistics[name]
        else:
            statistics[name] = _take(statistics[name], index, common)


def _take(array: SiteArray, index: np.ndarray, common: tuple[str, ...]) -> SiteArray:
    """Return the draws of an array at indices of shape ``(draw, *common)``."""
    axes = [1 + array.plates.index(name) for name in common]
    shape = [1] * array.values.ndim
    for axis, size in zip([0, *axes], index.shape, strict=True):
        shape[axis] = size
    return SiteArray(array.plates, np.take_along_axis(array.values, index.reshape(shape), 0))
