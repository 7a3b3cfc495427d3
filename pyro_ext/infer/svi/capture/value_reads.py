"""Reads values of tensors in a capture, and finds out on which inputs of the graph they depend."""

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_ext._private.of_torch import TorchDispatchMode, pytree, schema_of, without_modes
from pyro_ext.infer.svi.capture.operation_log import IN_PYTHON, CaptureError, CurrentSite

_INDEX = torch.ops.aten.index.Tensor


class ValueReads(TorchDispatchMode):
    """A mode for a capture, in which operations that need values get them, as constants.

    These operations are conversions to Python numbers, indices that are masks, and all operations
    whose results have shapes that depend on values.

    :param site: the current place in the program.
    """

    def __init__(self, site: CurrentSite) -> None:
        super().__init__()
        self.site = site
        #: Copies of the tensors that were read, and why each one may not depend on noise.
        self.tensors: list[Tensor] = []
        self.reasons: list[str] = []

    def read(self, x: Tensor, reason: str = IN_PYTHON) -> Tensor:
        """Return the values of a tensor as a constant."""
        copy = x.detach().clone()  # in the graph, this is the time of the reading
        self.tensors.append(copy)
        self.reasons.append(f"{reason}, {self.site.place}")
        with without_modes():
            return copy.clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.dynamic_output_shape in func.tags:
            return self._with_fixed_shape(func, args, kwargs)
        returns = schema_of(func).returns
        if returns and not any("Tensor" in str(out.type) for out in returns):
            args, kwargs = pytree.tree_map_only(Tensor, self.read, (args, kwargs))
            with without_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _with_fixed_shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        reason = (
            f"the shape of the result of {func} depends on values. Use operations with fixed "
            "shapes, such as torch.where"
        )
        if func is torch.ops.aten.masked_select.default:
            x, mask = torch.broadcast_tensors(*args)
            func, args = _INDEX, (x, [mask])
        if func is not _INDEX:
            out = func(*args, **kwargs)
            return pytree.tree_map_only(Tensor, lambda x: self.read(x, reason), out)
        positions: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                mask = self.read(index, reason)
                with without_modes():
                    positions += mask.nonzero(as_tuple=True)
            else:
                positions.append(index)
        return func(args[0], positions)


class ValueGuard(NamedTuple):
    """The values that a capture read, as a function of the inputs of the graph.

    :ivar values: the function.
    :ivar expected: the values at the capture.
    """

    values: GraphModule
    expected: list[Tensor]

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the inputs still lead to these values."""
        if not self.expected:
            return True
        with torch.no_grad():
            return all(map(torch.equal, self.values(*inputs), self.expected))


def split_off_guard(graph: GraphModule, reads: ValueReads, changing: Collection[int]) -> ValueGuard:
    """Remove the tensors that were read from the outputs of a graph, and return a guard of them.

    :param graph: the graph, whose last outputs are these tensors.
    :param reads: the readings.
    :param changing: the positions of the inputs that change in each step: the parameters.
    :raises CaptureError: if a value depends on them, on random numbers, or on an input that the
        step has changed in place.
    """
    (output,) = graph.graph.find_nodes(op="output")
    num_results = len(output.args[0]) - len(reads.tensors)
    nodes = output.args[0][num_results:]
    output.args = (output.args[0][:num_results],)
    inputs = list(graph.graph.find_nodes(op="placeholder"))
    sources = _Sources(graph.graph)
    variable = {inputs[index] for index in changing} | sources.writers_of(inputs)
    copied = set(inputs)
    guarded: dict[Node, Tensor] = {}
    for node, value, reason in zip(nodes, reads.tensors, reads.reasons, strict=True):
        of_node = sources.of(node)
        if any(source in variable or is_random(source.target) for source in of_node):
            raise CaptureError(reason)
        if not of_node.isdisjoint(inputs):
            guarded[node] = value
            copied |= of_node
    values, copies = Graph(), dict[Node, Node]()
    for node in graph.graph.nodes:
        if node in copied:
            copies[node] = values.node_copy(node, copies.__getitem__)
    values.output([copies[node] for node in guarded])
    return ValueGuard(GraphModule(graph, values), list(guarded.values()))


class _Sources:
    """The nodes on which each node of a graph depends, changes in place included."""

    def __init__(self, graph: Graph) -> None:
        self._direct: dict[Node, set[Node]] = {}
        self._writers: dict[Node, list[Node]] = {}  # by the first node with the same memory
        first: dict[Node, Node] = {}
        for node in graph.nodes:
            direct = set(node.all_input_nodes)
            for source in node.all_input_nodes:
                direct |= set(self._writers.get(first[source], [])[-1:])
            self._direct[node] = direct
            first[node] = node
            for source, is_written in _shared(node):
                first[node] = first[source]
                if is_written:
                    self._writers.setdefault(first[source], []).append(node)

    def writers_of(self, nodes: Sequence[Node]) -> set[Node]:
        """Return the nodes that change the memory of some nodes in place."""
        return {writer for node in nodes for writer in self._writers.get(node, [])}

    def of(self, node: Node) -> set[Node]:
        """Return a node and all nodes on which its value depends."""
        found: set[Node] = set()
        pending = [node]
        while pending:
            source = pending.pop()
            if source not in found:
                found.add(source)
                pending += self._direct[source]
        return found


def _shared(node: Node) -> Iterator[tuple[Node, bool]]:
    """Yield the inputs whose memory a node shares or changes, and whether it changes it."""
    if node.target is operator.getitem:
        yield node.all_input_nodes[0], False
    if not hasattr(node.target, "tags"):
        return
    for index, argument in enumerate(schema_of(node.target).arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        # The schema of batch_norm does not mark its running statistics as written.
        is_written = argument.name in ("running_mean", "running_var")
        alias = argument.alias_info
        if alias is not None or is_written:
            for source in pytree.tree_leaves(value):
                if isinstance(source, Node):
                    yield source, is_written or alias.is_write


def is_random(operation: Any) -> bool:
    """Return whether an operation draws from a random generator of torch."""
    return torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
