"""Makes sure that several processes train the same model and guide, with equal parameters."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._digest import digest
from pyro_ext.distributed.processes import Processes
from pyro_ext.infer.svi.capture.graph_inputs import current_params, params_of
from pyro_ext.infer.svi.capture.operation_log import set_up
from pyro_ext.infer.svi.run_settings import objective_settings, optimizer_settings


def _libraries() -> list[Any]:
    return [sys.modules["pyro_ext"], pyro, torch]


class SharedParams(Messenger):
    """A handler that gives new parameters the values that rank 0 has made.

    :param processes: the processes.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes
        self._is_new = False

    def _pyro_param(self, msg: Message) -> None:
        self._is_new = str(msg["name"]) not in pyro.get_param_store()

    def _pyro_post_param(self, msg: Message) -> None:
        store, name = pyro.get_param_store(), str(msg["name"])
        if self._is_new and name in store:
            self.processes.copy_from_first(current_params()[name])
            msg["value"] = store[name]


class _Plates(Messenger):
    """A handler that collects the plates, with their sizes.

    :ivar divided: the sizes of the plates of which a run has a part of the rows.
    :ivar whole: the sizes of the others.
    :ivar given: the plates whose rows the programs pass, as in ``subsample=x``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.divided: dict[str, int] = {}
        self.whole: dict[str, int] = {}
        self.given: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given.add(str(msg["name"]))

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            fn: Any = msg["fn"]
            value: Any = msg["value"]
            kind = self.divided if len(value) < fn.size else self.whole
            kind[str(msg["name"])] = fn.size


def divided_plates(
    svi: Any,
    processes: Processes,
    owner: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> set[str]:
    """Compare what the processes train, copy the parameters of rank 0, and return divided plates.

    Model and guide run once.

    :param svi: the SVI.
    :param processes: the processes.
    :param owner: the name of the SVI class, for messages.
    :param args: positional arguments of model and guide.
    :param kwargs: keyword arguments of model and guide.
    :returns: the names of the plates whose rows are divided over processes.
    :raises ValueError: if the processes differ.
    """
    plates = _Plates()
    tensors: dict[str, Tensor] = {}

    def describe() -> dict[str, dict[str, Any]]:
        with plates, poutine.trace(param_only=True) as trace:
            modules, _ = set_up(lambda: SVI.evaluate_loss(svi, *args, **kwargs), None)
        params = params_of(trace.trace)
        tensors.update((f"parameter '{name}'", x) for name, x in params.items())
        for i, module in enumerate(modules):
            own = [*module.named_parameters("", False), *module.named_buffers("", False)]
            kind = type(module).__name__
            tensors.update((f"'{key}' of module {i + 1} ({kind})", x) for key, x in own)
        settings = optimizer_settings(svi.optim, ()) | objective_settings(svi.objective)
        return {
            "version": {f"version of {x.__name__}": x.__version__ for x in _libraries()},
            "setting": {f"setting '{name}'": x for name, x in settings.items()},
            "tensor": {f"shape of {name}": (*x.shape, str(x.dtype)) for name, x in tensors.items()},
            "plate": {f"size of plate '{name}'": n for name, n in plates.divided.items()},
            "data": {"digest": digest([list(args), kwargs])},
        }

    found = processes.share(describe, owner)
    for kind in ("version", "setting", "tensor", "plate"):
        _raise_for_difference([x[kind] for x in found], owner)
    has_equal_data = len({x["data"]["digest"] for x in found}) == 1
    if not (plates.divided or has_equal_data):
        _raise_for_whole_plates(plates.whole, owner, processes)
    passed = plates.given & plates.divided.keys()
    if passed and has_equal_data:
        warnings.warn(
            f"{owner}: the first minibatch has the same rows in all {processes.size} processes. "
            f"Pass different rows of plate '{min(passed)}', for example with a DataLoader, which "
            "gets a DistributedSampler, or with pyro_ext.distributed.ShardedDataset.",
            stacklevel=6,
        )
    for x in _each_once(tensors.values()):
        processes.copy_from_first(x)
    return set(plates.divided)


def _each_once(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(x): x for x in tensors}.values()


def _raise_for_difference(found: list[dict[str, Any]], owner: str) -> None:
    """Raise a ValueError if the processes have different values under a name."""
    for rank, theirs in enumerate(found):
        for name in found[0].keys() | theirs.keys():
            first, other = found[0].get(name, "missing"), theirs.get(name, "missing")
            if first != other:
                raise ValueError(
                    f"{owner}: the {name} is {other} on rank {rank}, but {first} on rank 0. Run "
                    "the same program in each process."
                )


def _raise_for_whole_plates(sizes: dict[str, int], owner: str, processes: Processes) -> None:
    plate = next(iter(sizes), None)
    subject = "model and guide have no plate" if plate is None else f"plate '{plate}' has no more"
    raise ValueError(
        f"{owner}: the {processes.size} processes have different data, but {subject} rows than "
        f"each of them passes{'' if plate is None else f' ({sizes[plate]})'}. Give the plate the "
        "number N of all rows, as in pyro.plate('data', N, subsample=x), or pass the same data in "
        "each process."
    )
