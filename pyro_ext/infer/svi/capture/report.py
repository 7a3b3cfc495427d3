"""Reports the graphs of a training loop, their cost, and the reasons for eager steps."""

from dataclasses import dataclass
from typing import NamedTuple


class GraphRecord(NamedTuple):
    """A graph of a training loop.

    :ivar step: the number of steps before its capture.
    :ivar has_gradients: whether it computes gradients.
    :ivar num_operations: the number of tensor operations that were captured.
    :ivar num_kernels: the number of kernels that the compiler generated; None without a compiler.
        Calls of libraries, such as matrix products, come on top.
    :ivar capture_seconds: the time of the capture and its checks.
    :ivar compile_seconds: the time of the compiler.
    :ivar num_runs: the number of steps that ran it.
    :ivar last_used_at: the number of the last step that looked it up.
    """

    step: int
    has_gradients: bool
    num_operations: int
    num_kernels: int | None
    capture_seconds: float
    compile_seconds: float
    num_runs: int = 0
    last_used_at: int = 0

    def __str__(self) -> str:
        kernels = "" if self.num_kernels is None else f", {self.num_kernels} kernels"
        return (
            f"{self.num_operations} operations{kernels}, captured in {self.capture_seconds:.2g} s, "
            f"compiled in {self.compile_seconds:.2g} s"
        )


@dataclass(frozen=True)
class CaptureReport:
    """The graphs of a training loop, and the events that changed them.

    :ivar graphs: the graphs.
    :ivar max_graphs: the largest number of graphs.
    :ivar num_steps: the number of steps so far.
    :ivar num_eager_steps: the number of those without a graph. It includes the first step.
    :ivar events: captures, evictions, and reasons for eager steps. Each entry is a number of steps
        and a text.

    >>> graph = GraphRecord(1, True, 125, 6, 0.056, 3.4, num_runs=99, last_used_at=100)
    >>> print(CaptureReport([graph], 8, 100, 1, [(1, "captured a graph")]))
    1 of at most 8 graphs; 1 of 100 steps without a graph
    graph after step 1: 125 operations, 6 kernels, captured in 0.056 s, compiled in 3.4 s; 99 runs
    after step 1: captured a graph
    """

    graphs: list[GraphRecord]
    max_graphs: int
    num_steps: int
    num_eager_steps: int
    events: list[tuple[int, str]]

    def __str__(self) -> str:
        lines = [
            f"{len(self.graphs)} of at most {self.max_graphs} graphs; {self.num_eager_steps} of "
            f"{self.num_steps} steps without a graph"
        ]
        for graph in self.graphs:
            kind = "" if graph.has_gradients else ", without gradients"
            lines.append(f"graph after step {graph.step}{kind}: {graph}; {graph.num_runs} runs")
        lines += [f"after step {step}: {text}" for step, text in self.events]
        return "\n".join(lines)
