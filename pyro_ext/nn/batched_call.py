"""Calls of a module with given parameters, which may have any number of leading dims."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pyro_ext._private.of_torch import pytree
from pyro_ext._random_states import random_states, set_random_states

#: A function that maps one set of parameters to the module's output.
Run = Callable[[dict[str, Tensor]], Any]

# vmap raises these errors if it has no batching rule, if the control flow depends on values, or if
# an output is not a tensor.
_NOT_BATCHED = (RuntimeError, ValueError)


class BatchedCall:
    """A call of a module with one set of parameters, or with many sets at once.

    Many sets run under :func:`torch.func.vmap` if PyTorch has batching rules for everything that
    the module does. Otherwise they run one after the other. The first call finds out which.

    :param aliases: the further names of parameters that submodules share, each with the main name.
    """

    def __init__(self, aliases: dict[str, str]) -> None:
        self._aliases = aliases
        self._is_looped: dict[Any, bool] = {}

    def once(
        self, net: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Return the output for one set of parameters."""
        # Pass every name, because Module.to() replaces each buffer, which ends their sharing.
        shared = {alias: values[name] for alias, name in self._aliases.items() if name in values}
        return functional_call(net, {**values, **shared}, args, kwargs)

    def __call__(
        self, net: nn.Module, draws: dict[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Return the output, with the leading dims of the draws on the left.

        Leading dims of size 1 are placeholders, and are dropped.

        :param net: the module.
        :param draws: a dict from the name of a tensor of the module to its replacement, of shape
            ``(..., *shape)``.
        :param args: positional arguments of the module.
        :param kwargs: keyword arguments of the module.
        :returns: the output of the module.
        """
        shapes = {name: net.get_buffer(name).shape for name in draws}
        leading = torch.broadcast_shapes(
            *(draw.shape[: draw.dim() - len(shapes[name])] for name, draw in draws.items())
        )
        kept = torch.Size([size for size in leading if size != 1])
        fixed, batched = {}, {}
        for name, draw in draws.items():
            if draw.numel() == shapes[name].numel():
                fixed[name] = draw.reshape(shapes[name])
            else:
                batched[name] = draw.expand(leading + shapes[name]).reshape(-1, *shapes[name])
        if not batched:
            return self.once(net, fixed, args, kwargs)

        def run(batched: dict[str, Tensor]) -> Any:
            return self.once(net, {**fixed, **batched}, args, kwargs)

        output = self._run_all(net, run, batched, _kind(net, args, kwargs))
        return pytree.tree_map(
            lambda x: x.reshape(kept + x.shape[1:]) if isinstance(x, Tensor) else x, output
        )

    def _run_all(self, net: nn.Module, run: Run, batched: dict[str, Tensor], kind: Any) -> Any:
        if kind not in self._is_looped:
            is_batched, output = _try_batched(net, run, batched)
            if is_batched:
                self._is_looped[kind] = False
                return output
        elif not self._is_looped[kind]:
            try:
                return vmap(run, randomness="different")(batched)
            except _NOT_BATCHED:
                pass  # the control flow changed with the data, or the module itself fails
        output = _loop(run, batched)
        self._is_looped[kind] = True
        return output


def _kind(net: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Return a key of everything that may decide whether a call can be batched.

    The key has the training modes, the dims of tensors, the values of switches, and the types.
    """

    def kind_of(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dim()
        return x if isinstance(x, (bool, str)) else type(x)

    leaves = pytree.tree_leaves([*args, *sorted(kwargs.items())])
    return tuple(module.training for module in net.modules()), tuple(map(kind_of, leaves))


def _try_batched(net: nn.Module, run: Run, batched: dict[str, Tensor]) -> tuple[bool, Any]:
    """Return whether a module runs under vmap, and its output.

    If the module does not run under vmap, the random states and buffers are restored.
    """
    states = random_states()
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        with warnings.catch_warnings():
            # Operators without a batching rule run in a slow loop, and warn.
            warnings.simplefilter("error", UserWarning)
            return True, vmap(run, randomness="different")(batched)
    except (*_NOT_BATCHED, UserWarning):
        set_random_states(states)
        for buffer, before in buffers:
            buffer.copy_(before)
        return False, None


def _loop(run: Run, batched: dict[str, Tensor]) -> Any:
    """Return the stacked outputs of one call after the other."""
    num_draws = len(next(iter(batched.values())))
    outputs = [run({name: x[i] for name, x in batched.items()}) for i in range(num_draws)]
    return pytree.tree_map(
        lambda *same: torch.stack(same) if isinstance(same[0], Tensor) else same[0], *outputs
    )
