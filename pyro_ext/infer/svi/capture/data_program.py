from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ext.infer.svi.capture.graph_inputs import layout


class DataProgram:
    """The part of a step that computes numbers and shapes from data alone, as Python code.

    A graph holds for these numbers and shapes. Each step computes them before it runs the graph.

    :param graph: the operations. Their inputs are those of the graph of the step. Their results are
        the numbers, the tensors whose shape matters, and those that are inputs of the graph.
    :param num_reads: the number of the first kind of results.
    :param num_moved: the number of the last kind.
    """

    def __init__(self, graph: Callable[..., Any], num_reads: int, num_moved: int) -> None:
        self.graph = graph
        self.num_reads = num_reads
        self.num_moved = num_moved
        self.reads: list[Any] = []
        self.layouts: list[tuple[Any, ...]] = []

    def start(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the program for the inputs of a capture, and return the further inputs."""
        self.reads, self.layouts, moved = self._run(inputs)
        return moved

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the further inputs, or None if numbers or shapes differ from the capture."""
        reads, layouts, moved = self._run(inputs)
        is_same = layouts == self.layouts and all(map(_equal, self.reads, reads))
        return moved if is_same else None

    def _run(
        self, inputs: Sequence[Tensor]
    ) -> tuple[list[Any], list[tuple[Any, ...]], list[Tensor]]:
        with torch.no_grad():
            found = self.graph(*inputs)
        reads, tensors = found[: self.num_reads], found[self.num_reads :]
        return reads, [layout(x) for x in tensors], tensors[len(tensors) - self.num_moved :]


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor):
        return x.shape == y.shape and torch.equal(x, y)
    return bool(x == y or (x != x and y != y))
