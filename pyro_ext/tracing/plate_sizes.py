"""The sizes of plates that were made without a size."""

from collections.abc import Iterable
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
            node["cond_indep_stack"] = tuple(_with_sizes(node["cond_indep_stack"], sizes))


def _size_at(node: Any, dim: int) -> int:
    """Return the size of a batch dim, counted from the right, in the value of a site."""
    shape = getattr(node["value"], "shape", ())
    dim -= getattr(node["fn"], "event_dim", 0)
    return shape[dim] if len(shape) >= -dim else 1


def _with_sizes(stack: Iterable[Any], sizes: dict[str, tuple[int, int]]) -> Iterable[Any]:
    for frame in stack:
        if frame.size == UNKNOWN:
            size, full_size = sizes[frame.name]
            frame = frame._replace(size=size, full_size=full_size)
        yield frame
