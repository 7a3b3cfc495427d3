"""The sizes of plates that were made without a size."""

from collections.abc import Iterator
from typing import Any

from pyro.poutine import Trace

UNKNOWN = -1  # Pyro's size of such a plate


def set_plate_sizes(*traces: Trace) -> None:
    """Give each plate without a size the size that a plate of its name has elsewhere.

    If it has no size anywhere, it gets the size of its dim in the values of its sites.

    :param traces: the traces of a model and its guide, or of one of them. They are changed.
    """
    nodes: list[Any] = [n for t in traces for n in t.nodes.values() if n["type"] == "sample"]
    frames = [(node, frame) for node in nodes for frame in node["cond_indep_stack"]]
    unknown = {frame.name for _, frame in frames if frame.size == UNKNOWN}
    if not unknown:
        return
    sized = {f.name: f for _, f in frames if f.name in unknown and f.size != UNKNOWN}
    sizes = {name: (f.size, f.full_size) for name, f in sized.items()}
    for name in unknown - sizes.keys():
        size = max(_size_at(node, f.dim) for node, f in frames if f.name == name)
        sizes[name] = size, size
    for node in nodes:
        if any(frame.name in unknown for frame in node["cond_indep_stack"]):
            node["cond_indep_stack"] = tuple(_with_sizes(node, sizes))


def _size_at(node: Any, dim: int) -> int:
    """Return the size of a batch dim, counted from the right, of a site."""
    event_dim = getattr(node["fn"], "event_dim", 0)
    value = getattr(node["value"], "shape", ())
    shapes = value[: len(value) - event_dim], getattr(node["fn"], "batch_shape", ())
    return max(shape[dim] if len(shape) >= -dim else 1 for shape in shapes)


def _with_sizes(node: Any, sizes: dict[str, tuple[int, int]]) -> Iterator[Any]:
    """Yield the frames of a site with their sizes.

    A plate without a size does not expand its sites. A site of size 1 in a larger plate is the same
    for all of its elements, so it is not in the plate.
    """
    for frame in node["cond_indep_stack"]:
        if frame.size == UNKNOWN:
            size, full_size = sizes[frame.name]
            if size > 1 and _size_at(node, frame.dim) == 1:
                continue
            frame = frame._replace(size=size, full_size=full_size)
        yield frame
