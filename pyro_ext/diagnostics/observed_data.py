"""The data that several models observe, compared with each other."""

import math
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch

from pyro_ext.diagnostics.site_arrays import is_observation, is_unmasked
from pyro_ext.ops import accumulation_dtype
from pyro_ext.tracing import Programs
from pyro_ext.tracing.density_sites import plates_of
from pyro_ext.tracing.sites import is_masked_out


class Observation(NamedTuple):
    """The observed values of a site.

    :ivar shape: the shape of all values.
    :ivar size: the number of values that are not masked out.
    :ivar total: their sum.
    :ivar square: the sum of their squares.
    :ivar is_whole: whether no plate around the site is subsampled.
    """

    shape: tuple[int, ...]
    size: int
    total: float
    square: float
    is_whole: bool


class ObservedData(NamedTuple):
    """The data of a model.

    :ivar sites: a dict from the name of an observed site to its values; None if only the evidence
        of the model is known.
    :ivar plates: a dict from the name of a plate around the data to its size.
    """

    sites: dict[str, Observation] | None
    plates: dict[str, int]


@torch.no_grad()
def observed_data(owner: str, programs: Programs, allows_subsamples: bool) -> ObservedData:
    """Run a model and its guide once, and return the data of the model.

    :param owner: the calling function and the model, for error messages.
    :param programs: the model and guide.
    :param allows_subsamples: whether plates may be subsampled.
    :raises ValueError: if a plate is subsampled, unless this is allowed.
    """
    trace = programs.run()["model"]
    trace.compute_log_prob()
    sites: dict[str, Observation] = {}
    sizes: dict[str, int] = {}
    node: Any
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or is_masked_out(node) or not is_observation(node):
            continue
        plates = plates_of(node)
        sizes |= {plate.name: plate.full_size for plate in plates}
        subsampled = [plate for plate in plates if plate.size != plate.full_size]
        if subsampled and not allows_subsamples:
            plate = subsampled[0]
            raise ValueError(
                f"{owner} subsamples plate '{plate.name}' ({plate.size} of {plate.full_size} "
                f"rows). Do not subsample, or pass a guide and evidence_kwargs={{'data_plate': "
                f"'{plate.name}', 'batch_size': {plate.size}}}, which visits all of its rows."
            )
        mask = is_unmasked(node)
        event = node["value"].shape[node["value"].dim() - node["fn"].event_dim :]
        values = node["value"].expand(mask.shape + event)
        shape, values = tuple(values.shape), values[mask].to(accumulation_dtype(values.device))
        # Models may lay out their dims in different orders, so only sums are compared.
        total, square = values.sum().item(), values.square().sum().item()
        sites[name] = Observation(shape, values.numel(), total, square, not subsampled)
    return ObservedData(sites, sizes)


def check_same_data(owner: str, models: Mapping[str, ObservedData]) -> None:
    """Raise a ValueError unless models observe the same data, as far as it is known.

    :param owner: the name of the calling function.
    :param models: a dict from the name of a model to its data.
    """
    known = {name: data.sites for name, data in models.items() if data.sites is not None}
    for (one, its), (other, others) in pairwise(known.items()):
        if its.keys() != others.keys():
            raise ValueError(
                f"{owner}: model '{one}' observes the sites {sorted(its)}, but model '{other}' "
                f"observes {sorted(others)}. Evidences compare models of the same data only. "
                "Observe the same sites, with the same names."
            )
        for site, found in its.items():
            _check_same_values(owner, site, {one: found, other: others[site]})
    for (one, data), (other, others_data) in combinations(models.items(), 2):
        if data.sites is not None and others_data.sites is not None:
            continue
        for plate in data.plates.keys() & others_data.plates.keys():
            if data.plates[plate] != others_data.plates[plate]:
                raise ValueError(
                    f"{owner}: plate '{plate}' has {data.plates[plate]} data points in model "
                    f"'{one}', but {others_data.plates[plate]} in model '{other}'. Pass models "
                    "and evidences of the same data."
                )


def _check_same_values(owner: str, site: str, found: dict[str, Observation]) -> None:
    (one, its), (other, others) = found.items()
    if not (its.is_whole and others.is_whole):
        return  # each model has a minibatch of its own
    if its.size != others.size:
        raise ValueError(
            f"{owner}: site '{site}' has {its.size} values in model '{one}' (shape {its.shape}), "
            f"but {others.size} in model '{other}' (shape {others.shape}). Masked values do not "
            "count. Observe the same data in each model."
        )
    rounding = 1e-5 * math.sqrt(its.size * its.square)  # one may be in float32
    has_same_squares = math.isclose(its.square, others.square, rel_tol=1e-5)
    if abs(its.total - others.total) > rounding or not has_same_squares:
        raise ValueError(
            f"{owner}: site '{site}' has other values in model '{other}' than in model '{one}'. "
            "Observe the same data in each model. If one of them transforms the data, such as by a "
            "logarithm, use a TransformedDistribution of the data themselves."
        )
