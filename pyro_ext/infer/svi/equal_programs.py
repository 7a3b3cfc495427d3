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
from torch import Tensor, nn

from pyro_ext._digest import digest
from pyro_ext.distributed.processes import Processes
from pyro_ext.infer.svi.capture.graph_inputs import params_of
from pyro_ext.infer.svi.capture.operation_log import set_up
from pyro_ext.infer.svi.run_settings import objective_settings, optimizer_settings
from pyro_ext.tracing.sites import PARTICLE_PLATE


def _libraries() -> list[Any]:
    return [sys.modules["pyro_ext"], pyro, torch]


class _Plates(Messenger):
    """A handler that collects the plates, with their sizes.

    :ivar divided: the sizes of the plates of which a run has a part of the rows.
    :ivar whole: the sizes of the others.
    :ivar given: the plates whose rows the programs pass, as in ``subsample=x``.
    :ivar observed: the observed values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.divided: dict[str, int] = {}
        self.whole: dict[str, int] = {}
        self.given: set[str] = set()
        self.observed: list[Any] = []

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given.add(str(msg["name"]))

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["is_observed"]:
            self.observed.append(msg["value"])
        if site_is_subsample(msg) and msg["name"] != PARTICLE_PLATE:
            fn: Any = msg["fn"]
            value: Any = msg["value"]
            kind = self.divided if len(value) < fn.size else self.whole
            kind[str(msg["name"])] = fn.size


def compare_programs(
    svi: Any,
    processes: Processes,
    owner: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[set[str], dict[str, Tensor]]:
    """Compare what the processes train, and copy the parameters and buffers of rank 0.

    Model and guide run once.

    :param svi: the SVI.
    :param processes: the processes.
    :param owner: the name of the SVI class, for messages.
    :param args: positional arguments of model and guide.
    :param kwargs: keyword arguments of model and guide.
    :returns: the names of the plates whose rows are divided over processes, and the parameters that
        all processes use, by name.
    :raises ValueError: if the processes differ.
    """
    plates = _Plates()
    tensors: dict[str, Tensor] = {}
    params: dict[str, Tensor] = {}

    def describe() -> dict[str, dict[str, Any]]:
        with plates, poutine.trace(param_only=True) as trace:
            modules, _ = set_up(lambda: SVI.evaluate_loss(svi, *args, **kwargs), None)
        params.update(params_of(trace.trace))
        tensors.update({f"parameter '{name}'": x for name, x in params.items()})
        tensors.update(tensors_of(modules))
        settings = optimizer_settings(svi.optim, ()) | objective_settings(svi.objective)
        return {
            "version of {}": {x.__name__: x.__version__ for x in _libraries()},
            "setting '{}'": settings,
            "shape of {}": {name: (*x.shape, str(x.dtype)) for name, x in tensors.items()},
            "size of plate '{}'": plates.divided,
            "data": {"digest": digest([list(args), kwargs, plates.observed])},
            "params": dict.fromkeys(params),
        }

    found = processes.results_of_all(describe, owner)
    for label in ("version of {}", "setting '{}'", "shape of {}", "size of plate '{}'"):
        _raise_for_difference([x[label] for x in found], label, owner)
    divided = {name for x in found for name in x["size of plate '{}'"]}
    has_equal_data = len({x["data"]["digest"] for x in found}) == 1
    if not (divided or has_equal_data):
        _raise_for_whole_plates(plates.whole, owner, processes)
    passed = plates.given & plates.divided.keys()
    if passed and has_equal_data:
        warnings.warn(
            f"{owner}: the first minibatch has the same rows in all {processes.size} processes. "
            f"Pass different rows of plate '{min(passed)}', for example with a DataLoader, which "
            "gets a DistributedSampler, or with pyro_ext.distributed.ShardedDataset.",
            stacklevel=6,
        )
    copy_from_first(processes, tensors)
    known = set(params).intersection(*(x["params"] for x in found))
    return divided, {name: params[name] for name in known}


def tensors_of(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Return the parameters and buffers that modules own directly, with names for messages."""
    found: dict[str, Tensor] = {}
    for i, module in enumerate(modules, start=1):
        own = [*module.named_parameters("", False), *module.named_buffers("", False)]
        kind = type(module).__name__
        found |= {f"'{key}' of module {i} ({kind})": x for key, x in own}
    return found


def copy_from_first(processes: Processes, tensors: dict[str, Tensor]) -> None:
    """Give tensors that all processes have the values of rank 0.

    :param processes: the processes.
    :param tensors: the tensors of this process by name.
    """
    tensors = {name: x for name, x in tensors.items() if _can_be_copied(x)}
    names = set(tensors).intersection(*processes.gather(list(tensors)))
    for x in {id(tensors[name]): tensors[name] for name in sorted(names)}.values():
        processes.copy_from_first(x)


def _can_be_copied(x: Tensor) -> bool:
    """Return whether a tensor is dense and has memory of its own for each entry."""
    if x.layout != torch.strided:
        return False
    return all(stride > 0 or n <= 1 for stride, n in zip(x.stride(), x.shape, strict=True))


def share_params(processes: Processes, late: Iterable[str], params: dict[str, Tensor]) -> list[str]:
    """Give parameters that are new in some processes equal values.

    If the parameter is not new in a process, its value there counts, and otherwise that of the
    first process that has it. A process without the parameter creates it.

    :param processes: the processes.
    :param late: the names of the parameters that are new in this process.
    :param params: all parameters of this process by name.
    :returns: the names of the parameters that are new in any process.
    """
    store = pyro.get_param_store()
    own = set(late)
    wanted = sorted(set().union(*processes.gather(own)))
    constraints = store.get_state()["constraints"]
    offers = processes.gather(
        {
            name: (name not in own, params[name].detach(), constraints.get(name))
            for name in wanted
            if name in params
        }
    )
    for name in wanted:
        offered = [of_rank[name] for of_rank in offers if name in of_rank]
        _, value, constraint = max(offered, key=lambda offer: offer[0])
        if name in params:
            params[name].data.copy_(value)
        elif constraint is not None:
            value.requires_grad_()
            store.set_state({"params": {name: value}, "constraints": {name: constraint}})
    return wanted


def _raise_for_difference(found: list[dict[str, Any]], label: str, owner: str) -> None:
    """Raise a ValueError if the processes have different values under a name."""
    for rank, theirs in enumerate(found):
        for name in sorted(found[0].keys() & theirs.keys()):
            first, other = found[0][name], theirs[name]
            if first != other:
                raise ValueError(
                    f"{owner}: the {label.format(name)} is {other} on rank {rank}, but {first} on "
                    "rank 0. Run the same program in each process."
                )


def _raise_for_whole_plates(sizes: dict[str, int], owner: str, processes: Processes) -> None:
    found = "model and guide have no plate with a size"
    if sizes:
        plate, num_rows = next(iter(sizes.items()))
        found = f"plate '{plate}' has no more rows than each of them passes ({num_rows})"
    raise ValueError(
        f"{owner}: the {processes.size} processes have different data, but {found}. Give the plate "
        "the number N of all rows, as in pyro.plate('data', N, subsample=x), or pass the same data "
        "in each process."
    )
