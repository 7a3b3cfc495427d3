"""Records the operations of a run as a graph, a function of tensors only."""

import enum
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import has_side_effect
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_ext._private.of_torch import (
    PACK_SEQUENCE,
    is_check,
    is_random,
    pytree,
    schema_of,
    storage_of,
)
from pyro_ext.infer.svi.capture.data_program import DataProgram

_MAX_READ = 10_000  # entries of a tensor that a program reads at once
_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class CaptureError(Exception):
    """An error for a step that cannot be captured. The message is the reason and the place."""


class Origin(enum.IntFlag):
    """What the values of a tensor depend on, other than constants."""

    CONSTANT = 0
    #: Arguments, and tensors that need no gradients and are not changed by the run.
    DATA = 1
    #: Parameters, and tensors that the run changes.
    STATE = 2
    NOISE = 4


class GraphRecorder:
    """A graph that grows with each operation of a run.

    It knows what each tensor depends on. If a program turns a tensor into Python numbers that
    depends on data only, the graph holds for these numbers, and each step computes them first. The
    same is true of tensors whose shape depends on data.

    :param given: the tensors that are the first inputs of the graph.
    """

    def __init__(self, given: Collection[Tensor]) -> None:
        self.graph = Graph()
        self.constants = nn.Module()
        self.nodes = WeakTensorKeyDictionary()
        #: The inputs of the graph, with their nodes.
        self.inputs: list[tuple[Tensor, Node]] = []
        #: Nodes of numbers and tensors that the programs read.
        self.reads: list[Node] = []
        #: Nodes of data with a result whose shape depends on values.
        self.variable: list[Node] = []
        #: The draws that no operation of the graph makes.
        self.draws: list[Callable[[], Tensor]] = []
        self._draw_nodes: list[Node] = []
        self._num_constants = 0
        self._origins: dict[int, Origin] = {}
        self._storages: set[int] = set()
        self.given = set(given)
        for tensor in given:
            self.add_input(tensor)

    def add_input(self, x: Tensor) -> None:
        """Make a tensor an input of the graph, unless it is one."""
        if x in self.nodes:
            return
        node = self._placeholder(f"input_{len(self.inputs)}")
        self.inputs.append((x, node))
        self._set(x, node, Origin.STATE if x.requires_grad else Origin.DATA)
        if x.layout == torch.strided:
            self._storages.add(storage_of(x))
            self._origins[storage_of(x)] = node.meta["origin"]

    def _placeholder(self, name: str) -> Node:
        """Add a placeholder after the others, before all operations."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        if first is None:
            return self.graph.placeholder(name)
        with self.graph.inserting_before(first):
            return self.graph.placeholder(name)

    def _set(self, x: Tensor, node: Node, origin: Origin) -> None:
        self.nodes[x] = node
        node.meta["origin"], node.meta["dtype"] = origin, x.dtype

    def origin_of(self, x: Tensor) -> Origin:
        """Return what the values of a tensor depend on. Views depend on the whole memory."""
        if x.layout != torch.strided:
            return ~Origin.CONSTANT
        return self._origins.get(storage_of(x), Origin.CONSTANT)

    def record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        written: Iterable[Tensor],
    ) -> None:
        """Add an operation.

        :param func: the operator.
        :param args: its positional arguments.
        :param kwargs: its keyword arguments.
        :param out: its result.
        :param written: those of its arguments that it has changed in place.
        :raises CaptureError: if its result is a Python number or has a shape that depends on more
            than data.
        """
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_literal = func is torch.ops.aten.lift_fresh.default
        if is_literal:  # its memory may have belonged to another tensor
            self._origins[storage_of(args[0])] = Origin.CONSTANT
        origin = Origin.NOISE if is_random(func) else Origin.CONSTANT
        for x in tensors:
            origin |= self.origin_of(x)
        before = {storage_of(x) for x in tensors if x.layout == torch.strided}
        for x in written:
            if storage_of(x) in self._storages:
                origin |= Origin.STATE
        for x in written:
            self._origins[storage_of(x)] = self.origin_of(x) | origin
        if is_literal:  # each run of the graph needs its own copy
            func, args = torch.ops.aten.clone.default, (args[0].detach().clone(),)
        if func in _INDEXED:
            args = (args[0], self._without_constant_masks(args[1]), *args[2:])
        new_args, new_kwargs = pytree.tree_map(self._argument, (args, kwargs))
        deciding = [x for x in _deciding(func, args, tensors) if self._decides(func, x)]
        if deciding and origin & ~Origin.DATA:
            if func is PACK_SEQUENCE:
                self._read_copy(args[1])
            elif func in (torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default):
                func, new_args = torch.ops.aten.index.Tensor, self._with_indices(func, *args)
        node = self.graph.call_function(func, new_args, new_kwargs)
        node.meta["origin"] = origin
        if isinstance(out, (bool, int, float, complex)):
            self._read(node)
        self._add_results(node, out, set() if is_literal else before)
        if deciding and not origin & ~Origin.DATA:
            self.variable.append(node)

    def record_draw(
        self, func: Any, args: tuple[Any, ...], draw: Callable[..., Any], out: Tensor
    ) -> None:
        """Add a draw from a stream that is not torch's generator. It is an input of the graph.

        :param func: the random operator.
        :param args: its arguments.
        :param draw: a function that returns its result for other tensors in the place of ``args``.
        :param out: its result.
        :raises CaptureError: if the draw depends on more than constants.
        """
        for x in args[1:] if schema_of(func).is_mutable else args:  # the first one is filled
            if isinstance(x, Tensor) and self.origin_of(x) != Origin.CONSTANT:
                raise CaptureError(
                    "the random numbers of a site that all processes share, or of rows with "
                    "streams of their own, depend on parameters or data. Use a reparameterised "
                    "distribution whose noise does not, such as Normal"
                )
        given = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
        node = self.graph.call_function(draw, (len(self.draws),))
        self.draws.append(lambda: draw(*map(_copy, given)))
        self._draw_nodes.append(node)
        self._set(out, node, Origin.NOISE)
        self._origins[storage_of(out)] = Origin.NOISE

    def _without_constant_masks(self, indices: Iterable[Any]) -> list[Any]:
        """Return indices in the place of constant masks, of which compilers know the shapes."""
        found: list[Any] = []
        for index in indices:
            is_mask = index is not None and _is_mask(index)
            if is_mask and self.origin_of(index) == Origin.CONSTANT:
                found += index.nonzero().unbind(1)
            else:
                found.append(index)
        return found

    def _decides(self, func: Any, x: Tensor) -> bool:
        """Return whether data decide about the shape of a result through one of its arguments.

        :raises CaptureError: if more than data decide.
        """
        if self.origin_of(x) & ~Origin.DATA:
            raise CaptureError(
                f"the shape of the result of {func} depends on values. Use operations with fixed "
                "shapes, such as torch.where"
            )
        return self.origin_of(x) == Origin.DATA

    def _with_indices(self, func: Any, x: Tensor, masks: Any) -> tuple[Any, ...]:
        """Return the arguments of ``aten.index`` with indices in the place of masks."""
        if func is torch.ops.aten.masked_select.default:
            shape = list(torch.broadcast_shapes(x.shape, masks.shape))
            source, mask = (
                self._call(torch.ops.aten.expand.default, (self.node_of(y), shape), y)
                for y in (x, masks)
            )
            return source, self._indices(mask, len(shape))
        indices: list[Node | None] = []
        for mask in masks:
            if mask is None or not _is_mask(mask):
                indices.append(self._argument(mask))
            else:
                indices += self._indices(self.node_of(mask), mask.dim())
        return self.node_of(x), indices

    def _indices(self, mask: Node, num_dims: int) -> list[Node | None]:
        rows = self._call(torch.ops.aten.nonzero.default, (mask,), None)
        self.variable.append(rows)
        select = torch.ops.aten.select.int
        return [self._call(select, (rows, 1, dim), None) for dim in range(num_dims)]

    def _call(self, func: Any, args: tuple[Any, ...], like: Tensor | None) -> Node:
        """Add an operation that the programs do not have, whose result depends on data or x."""
        node = self.graph.call_function(func, args)
        node.meta["origin"] = Origin.DATA if like is None else self.origin_of(like)
        node.meta["dtype"] = torch.int64 if like is None else like.dtype
        return node

    def _argument(self, x: Any) -> Any:
        return self.node_of(x) if isinstance(x, Tensor) else x

    def knows(self, x: Any) -> bool:
        """Return whether a value is one of the given tensors, or a result of an operation."""
        if not isinstance(x, Tensor) or x not in self.nodes:
            return False
        return x in self.given or self.nodes[x].op != "placeholder"

    def node_of(self, x: Tensor) -> Node:
        """Return the node of a tensor. A tensor that no operation has made is a constant."""
        if x not in self.nodes:
            self.nodes[x] = self._constant(x)
        return self.nodes[x]

    def _constant(self, x: Tensor) -> Node:
        name = f"constant_{self._num_constants}"
        self._num_constants += 1
        self.constants.register_buffer(name, x.detach().clone())
        node = self.graph.get_attr(name)
        node.meta["origin"], node.meta["dtype"] = Origin.CONSTANT, x.dtype
        return node

    def _add_results(self, node: Node, out: Any, before: set[int]) -> None:
        if isinstance(out, Tensor):
            origin: Origin = node.meta["origin"]
            self._set(out, node, origin)
            if out.layout == torch.strided:
                storage = storage_of(out)
                shared = self.origin_of(out) if storage in before else Origin.CONSTANT
                self._origins[storage] = shared | origin
        elif isinstance(out, (tuple, list)):
            for index, part in enumerate(out):
                if isinstance(part, (Tensor, tuple, list)):
                    item = self.graph.call_function(operator.getitem, (node, index))
                    item.meta["origin"] = node.meta["origin"]
                    self._add_results(item, part, before)

    def _read(self, node: Node) -> None:
        """Note that the programs use the value of a node."""
        origin: Origin = node.meta["origin"]
        if origin & ~Origin.DATA:
            raise CaptureError(
                "the model or guide uses the value of a tensor in Python code (for a branch, use "
                "torch.where)"
            )
        if origin:
            self.reads.append(node)

    def read_all(self, x: Tensor) -> bool:
        """Note that the programs copy a tensor to Python, and return whether they may."""
        if self.origin_of(x) & ~Origin.DATA or x.numel() > _MAX_READ:
            return False
        self._read_copy(x)
        return True

    def _read_copy(self, x: Tensor) -> None:
        # A copy, because later operations may change the tensor.
        self._read(self._call(torch.ops.aten.clone.default, (self.node_of(x),), x))

    def finish(
        self, outputs: Sequence[Tensor | None], lasting: Iterable[Tensor]
    ) -> tuple[GraphModule, DataProgram | None]:
        """Return the graph, and the program that computes what it needs from data alone.

        :param outputs: the tensors that the graph returns.
        :param lasting: the inputs that stay inputs. All others are constants.
        """
        kept = {id(x) for x in lasting}
        for x, node in self.inputs:
            if id(x) not in kept:
                with self.graph.inserting_after(self.inputs[-1][1]):
                    node.replace_all_uses_with(self._constant(x))
                self.graph.erase_node(node)
        self.graph.output([None if x is None else self.node_of(x) for x in outputs])
        data = self._data_program()
        for index, node in enumerate(self._draw_nodes):
            node.replace_all_uses_with(self._placeholder(f"draw_{index}"))
            self.graph.erase_node(node)
        for node in self.graph.nodes:
            target: Any = node.target
            if is_check(target) and not node.is_impure():
                has_side_effect(target)  # for all compilers, because torch 2.6 does not know it
        self.graph.eliminate_dead_code(lambda node: node.is_impure() or is_random(node.target))
        self._keep_random_numbers()
        return GraphModule(self.constants, self.graph), data

    def _data_program(self) -> DataProgram | None:
        """Return the operations on data that decide about the graph, or None if there are none.

        Tensors whose shape depends on data become inputs of the graph.
        """
        after, moved, watched = set(self.variable), [], []
        for node in self.graph.nodes:
            if _is_of_data(node) and not after.isdisjoint((node, *node.all_input_nodes)):
                after.add(node)
                if not all(map(_is_of_data, node.users)):
                    moved.append(node)
        for node in self.variable:
            results = [node] if "dtype" in node.meta else node.users
            watched += [x for x in results if x not in moved]
        if not self.reads and not after:
            return None
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder" or _is_of_data(node):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[node] for node in (*self.reads, *watched, *moved)])
        # The graph itself makes the checks, and the programs may handle their errors.
        graph.eliminate_dead_code(lambda node: node.is_impure() and not is_check(node.target))
        for index, node in enumerate(moved):
            new = self._placeholder(f"moved_{index}")
            node.replace_all_uses_with(new, lambda user: not _is_of_data(user))
        return DataProgram(GraphModule(self.constants, graph), len(self.reads), len(moved))

    def _keep_random_numbers(self) -> None:
        """Keep the draws of unused random numbers, so that the later ones equal those of Pyro."""
        (output,) = self.graph.find_nodes(op="output")
        unused = [node for node in self.graph.nodes if is_random(node.target) and not node.users]
        output.args = ([*output.args[0], *unused],)


def _is_of_data(node: Node) -> bool:
    """Return whether a node depends on nothing but data and constants."""
    return node.op != "output" and not node.meta["origin"] & ~Origin.DATA


def _deciding(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Return the arguments whose values decide about the shape of the result."""
    if func is torch.ops.aten.index.Tensor:
        return [mask for mask in args[1] if mask is not None and _is_mask(mask)]
    if func in (torch.ops.aten.masked_select.default, PACK_SEQUENCE):
        return [args[1]]
    return tensors if torch.Tag.dynamic_output_shape in getattr(func, "tags", ()) else []


def _is_mask(x: Tensor) -> bool:
    return x.dtype in (torch.bool, torch.uint8)


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
