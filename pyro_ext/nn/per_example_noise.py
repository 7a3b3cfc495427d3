"""The base of the effect handlers that give each example its own weights."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyro_ext._private.of_torch import pytree


class NormalDraw(NamedTuple):
    """A draw from a normal. Values that are not drawn have None as standard deviation."""

    value: Tensor
    loc: Tensor
    scale: Tensor | None


class Layer(NamedTuple):
    """One use of a layer. ``function(input, weight, bias)`` returns its output for given weights.

    All uses of a weight share the dict ``noise``, and all uses of a bias the dict ``bias_noise``.
    The dicts are empty at the first use.
    """

    name: str
    function: Callable[..., Tensor]
    input: Tensor
    weight: NormalDraw
    bias: NormalDraw | None
    is_convolution: bool
    noise: dict[str, Any]
    bias_noise: dict[str, Any]


class NoisePerExample(Messenger):
    """The base class of handlers that replace the layers which use draws from the guide's normals.

    A subclass lists its layers, which are functions of torch, and computes the output of a layer.
    """

    functions: ClassVar[tuple[Callable[..., Tensor], ...]]

    #: Read by estimators: a nonlinear bound would need the density of each example's weights.
    needs_linear_objective = True

    def __init__(self) -> None:
        super().__init__()
        self._draws: dict[str, tuple[Tensor, NormalDraw | None]] = {}

    @abstractmethod
    def output(self, layer: Layer) -> Tensor:
        """Return the output of a layer."""
        raise NotImplementedError

    def refuse(self, message: str) -> NoReturn:
        """Raise a ValueError that begins with the name of the handler."""
        raise ValueError(f"{type(self).__name__}: {message}")

    def __exit__(self, *exception: Any) -> None:
        self._draws = {}
        super().__exit__(*exception)

    def _pyro_post_sample(self, msg: Message) -> None:
        name: Any = msg["name"]
        fn: Any = msg["fn"]
        value = msg["value"]
        if msg["is_observed"] or not isinstance(value, Tensor):
            return
        if name in self._draws and _is_same(self._draws[name][0], value):
            return  # the model's site, replayed from the guide
        while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
            fn = fn.base_dist
        normal = None
        if isinstance(fn, torch.distributions.Normal) and not self._is_conditional(fn):
            loc, scale = fn.loc.expand(value.shape), fn.scale.expand(value.shape)
            normal = NormalDraw(value, loc, scale)
        self._draws[name] = value, normal

    def _is_conditional(self, fn: torch.distributions.Normal) -> bool:
        """Return whether the autograd graph of a normal's parameters reaches another draw."""
        draws = {value.grad_fn for value, _ in self._draws.values()} - {None}
        pending, seen = [fn.loc.grad_fn, fn.scale.grad_fn], set(draws)
        while pending:
            node = pending.pop()
            if node in draws:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                pending.extend(parent for parent, _ in node.next_functions)
        return False

    def _pyro_bayesian_module(self, msg: Message) -> None:
        call, net, draws, args, kwargs = msg["args"]
        normals = {name: self._normal(net, name, value) for name, value in draws.items()}
        with _Layers(self, draws, normals, _batch_size(self, args, kwargs)) as layers:
            msg["value"] = call.once(net, draws, args, kwargs)
        layers.check_use()
        msg["done"] = True

    def _normal(self, net: nn.Module, name: str, value: Tensor) -> NormalDraw | None:
        shape = net.get_buffer(name).shape
        if value.shape != shape:
            self.refuse(
                f"'{name}' has several draws at once, with shape {tuple(value.shape)} instead of "
                f"{tuple(shape)}. Use one particle, or vectorize_particles=False."
            )
        # Compare by value, because autoguides draw a site under another name.
        for drawn, normal in self._draws.values():
            if normal is not None and _is_same(drawn, value):
                return normal._replace(value=value)
        return None


class _Layers(TorchFunctionMode):
    """A mode that intercepts the layers of a module that use drawn weights."""

    def __init__(
        self,
        handler: NoisePerExample,
        draws: dict[str, Tensor],
        normals: dict[str, NormalDraw | None],
        batch_size: int,
    ) -> None:
        super().__init__()
        self.handler = handler
        self.names = {id(value): name for name, value in draws.items()}
        self.normals = normals
        self.batch_size = batch_size
        self.noise: dict[str, dict[str, Any]] = {}
        self.used_elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = {id(x) for x in pytree.tree_leaves((args, kwargs))} & set(self.names)
        if drawn and func in self.handler.functions:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            weight, bias = given.get("weight"), given.get("bias")
            if {id(weight), id(bias)} & drawn:
                drawn -= {id(weight), id(bias)}
                self.used_elsewhere |= {self.names[key] for key in drawn}
                return self._replace(func, *args, **kwargs)
        output = func(*args, **kwargs)
        has_tensor = any(isinstance(x, Tensor) for x in pytree.tree_leaves(output))
        if has_tensor:  # the output is not just a shape or a dtype
            self.used_elsewhere |= {self.names[key] for key in drawn}
        return output

    def check_use(self) -> None:
        """Raise a ValueError unless layers were replaced and nothing else uses their weights."""
        if not self.noise:
            kinds = ", ".join(function.__name__ for function in self.handler.functions)
            self.handler.refuse(
                f"the module has no latent weights in a supported layer ({kinds}). Run it without "
                f"{type(self.handler).__name__}."
            )
        for name in sorted(self.used_elsewhere & set(self.noise)):
            self.handler.refuse(
                f"'{name}' is also used outside its layer, where it would not have the same noise. "
                "Use it only in its layer."
            )

    def _replace(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        drawn = [self.names[id(x)] for x in (weight, bias) if id(x) in self.names]
        num_dims = max(input.dim(), 2) if func is F.linear else weight.dim()
        if input.dim() != num_dims or input.shape[0] != self.batch_size:
            self.handler.refuse(
                f"the layer of '{drawn[0]}' has an input of shape {tuple(input.shape)}. Pass an "
                f"input of {num_dims} dims with the {self.batch_size} examples in the first dim."
            )
        noise = {name: self.noise.setdefault(name, {}) for name in drawn}
        return self.handler.output(
            Layer(
                name=drawn[0],
                function=lambda x, w, b: func(x, w, b, *args, **kwargs),
                input=input,
                weight=self._normal(weight),
                bias=None if bias is None else self._normal(bias),
                is_convolution=func is not F.linear,
                noise=noise.get(self.names.get(id(weight), ""), {}),
                bias_noise=noise.get(self.names.get(id(bias), ""), {}),
            )
        )

    def _normal(self, value: Tensor) -> NormalDraw:
        name = self.names.get(id(value))
        if name is None:
            return NormalDraw(value, value, None)
        normal = self.normals[name]
        if normal is None:
            self.handler.refuse(
                f"the guide does not draw '{name}', in this run, from a normal with independent "
                "entries that depends on no other draw. Use a guide that does, such as "
                "MeanFieldGuide or AutoNormal."
            )
        return normal


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are the same, or views of the same memory with the same shape."""
    if x is y:
        return True
    return (x.shape, x.stride()) == (y.shape, y.stride()) and x.data_ptr() == y.data_ptr()


def _batch_size(handler: NoisePerExample, args: tuple[Any, ...], kwargs: Any) -> int:
    """Return the number of examples: the first size of the module's first input."""
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.dim() > 0:
            return x.shape[0]
    handler.refuse("the module has no input tensor. Pass the examples in its first dim.")
