"""The values of a site with draws and named plates on the left."""

from typing import Any

from torch import Tensor

from pyro_ext.tracing.density_sites import plates_of


def with_plates(
    node: Any, value: Tensor, event_dim: int, num_draws: int, rank: int
) -> tuple[tuple[str, ...], Tensor]:
    """Return the names of a site's plates, and a value of shape ``(draw, *plates, *event)``.

    :param node: the site.
    :param value: a value, which may lack batch dims on the left.
    :param event_dim: the number of event dims of the value.
    :param num_draws: the number of draws, in the leftmost batch dim.
    :param rank: the number of batch dims, including the dim of the draws.
    """
    by_dim = {plate.dim: plate for plate in plates_of(node) if plate.dim is not None}
    plates = [by_dim[dim] for dim in sorted(by_dim)]
    batch = [by_dim[dim].size if dim in by_dim else 1 for dim in range(1 - rank, 0)]
    event = value.shape[value.dim() - event_dim :]
    sizes = [plate.size for plate in plates]
    whole = value.expand(num_draws, *batch, *event).reshape(num_draws, *sizes, *event)
    return tuple(plate.name for plate in plates), whole
