"""What several processes do together while each trains the same model and guide."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pyro_ext._random_states import kept_random_states, random_states
from pyro_ext.distributed.gradients import Contribution, GradientExchange, Total
from pyro_ext.distributed.loaders import with_share_of_rows
from pyro_ext.distributed.noise import DistributedNoise, active_noise, active_rows
from pyro_ext.distributed.packing import Gradients
from pyro_ext.distributed.processes import Processes, describe_error
from pyro_ext.distributed.streams import agreed_seed, seed_of, seed_stream
from pyro_ext.infer.svi.capture.graph_inputs import current_params
from pyro_ext.infer.svi.equal_programs import (
    compare_programs,
    copy_from_first,
    share_params,
    tensors_of,
)
from pyro_ext.infer.svi.minibatches import length_of

Losses = tuple[float, ...]


class TrainingGroup:
    """The processes that train together. Each has a share of the rows of a minibatch.

    In a mean over processes, the weight of a process is its number of rows.

    :param processes: the processes.
    :param owner: the name of the SVI class, for messages.
    :param bucket_bytes: the number of bytes at which a vector of gradients is sent.
    """

    def __init__(self, processes: Processes, owner: str, bucket_bytes: float) -> None:
        self.processes = processes
        self.owner = owner
        self.exchange = GradientExchange(processes, bucket_bytes)
        self._noise: DistributedNoise | None = None
        self._num_runs = 0
        self._saved: dict[str, Any] | None = None
        #: Returns whether this process has received a signal to end.
        self.has_signal: Callable[[], bool] = lambda: False
        #: Whether a process had received a signal to end before the latest step.
        self.is_interrupted = False
        self._is_awaited = False
        self._num_steps = 0
        #: The parameters that have had the same values in all processes, by name.
        self._last_params: dict[str, Tensor] = {}

    def start(self, svi: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make sure that all processes train the same, and give them equal parameters.

        :param svi: the SVI.
        :param args: positional arguments of model and guide, for the first step.
        :param kwargs: keyword arguments of model and guide.
        :raises ValueError: if the processes differ, or if the rows of a process are not those of a
            plate that has a size.
        """
        if self._noise is not None:
            return
        plates, params = compare_programs(svi, self.processes, self.owner, args, kwargs)
        self._last_params |= params
        self._noise = DistributedNoise(plates, self.seed)
        if self._saved is None:
            seed_stream(self.seed, self.processes.rank)
        elif self._saved["noise"] is not None:
            self._noise.set_stream_state(self._saved["noise"])

    @cached_property
    def seed(self) -> int:
        """The seed of all streams of random numbers, and of the order of the rows."""
        if self._saved is not None:
            return int(self._saved["seed"])
        with kept_random_states():  # new parameters get the values of a run of one process
            return agreed_seed(self.processes)

    def state(self, own: dict[str, Any], is_joint: bool) -> dict[str, Any]:
        """Return what a checkpoint holds beside the state of its process.

        :param own: the random states of this process.
        :param is_joint: whether all processes call this method now, to save their random states.
        """
        return {
            "seed": self.seed,
            "num_runs": self._num_runs,
            "noise": self._noise and self._noise.stream_state(),
            "rank_and_size": [self.processes.rank, self.processes.size],
            "ranks": self.processes.gather(own) if is_joint else [],
        }

    def load(self, state: dict[str, Any] | None, own: dict[str, Any]) -> dict[str, Any]:
        """Continue from a checkpoint.

        :param state: the result of :meth:`state`; None if one process has saved the checkpoint.
        :param own: the random states of the process that has saved it.
        :returns: the random states of this process. If the checkpoint does not have them, they come
            from those of the process that has saved it.
        """
        self._saved = state
        if state is not None:
            self._num_runs = state["num_runs"]
            vars(self).pop("seed", None)
            if self._noise is not None and state["noise"] is not None:
                self._noise.set_stream_state(state["noise"])
            if len(state["ranks"]) == self.processes.size:
                return dict(state["ranks"][self.processes.rank])
            if state["rank_and_size"] == [self.processes.rank, self.processes.size]:
                return own
        with kept_random_states():
            seed_stream(int(own["random"]["cpu"].long().sum()), self.processes.rank)
            return {**own, "random": random_states()}

    def agree(self, owner: str, check: Callable[[], None], **arguments: Any) -> dict[str, Any]:
        """Check the arguments of a run in each process.

        :param owner: the name of the method, for messages.
        :param check: the check.
        :param arguments: the arguments about which the processes agree.
        :returns: the arguments of rank 0, and whether any process has a callback.
        :raises ValueError: if the processes have different numbers of epochs.
        """

        def checked() -> dict[str, Any]:
            check()
            return arguments

        found = self.processes.results_of_all(checked, owner)
        for rank, theirs in enumerate(found):
            if theirs["num_epochs"] != found[0]["num_epochs"]:
                raise ValueError(
                    f"{owner}: num_epochs is {theirs['num_epochs']} on rank {rank}, but "
                    f"{found[0]['num_epochs']} on rank 0. Pass the same number in each process."
                )
        return {**found[0], "has_callback": any(x["has_callback"] for x in found)}

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0."""
        return self.processes.rank == 0

    def new_run(self) -> None:
        """Begin a run, whose rows come in another order than those of earlier runs."""
        self._num_runs += 1

    def data_of_process(self, owner: str, data: Any) -> Any:
        """Return data whose minibatches hold the rows of this process."""
        seed = seed_of(self.seed, f"order {self._num_runs}") % 2**32
        found = []

        def divide() -> None:
            found.append(with_share_of_rows(owner, data, self.processes, seed))

        self.processes.results_of_all(divide, owner)
        return found[0]

    def length_of(self, data: Any) -> int | None:
        """Return the number of steps of an epoch; None if it is not known.

        :param data: the minibatches of this process.
        :raises ValueError: if a process has no minibatches.
        """
        lengths = self.processes.gather(length_of(data))
        if 0 in lengths:
            raise ValueError(
                f"{self.owner}.run: data has no minibatches on rank {lengths.index(0)} of "
                f"{len(lengths)}. Give each process at least one."
            )
        known = [length for length in lengths if length is not None]
        return max(known) if len(known) == len(lengths) else None

    def copy_state(self, modules: Iterable[nn.Module]) -> None:
        """Give buffers, and what Pyro keeps beside parameters, the values of rank 0.

        :param modules: the modules that model and guide call.
        """
        others = {
            name: x for name, x in current_params().items() if name not in self.exchange.places
        }
        copy_from_first(self.processes, tensors_of(modules) | others)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a step. If it fails in one process, it fails in all of them."""
        self._num_steps += 1
        own: Any = self._noise if active_noise() is None else nullcontext()
        with self.awaited(), own:
            yield

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Tell the other processes, which wait in the next exchange, if a block fails."""
        self._is_awaited = True
        try:
            yield
        except BaseException as error:
            if self._is_awaited:
                self._is_awaited = False
                text = describe_error(error)
                if self._noise is None:  # the others compare programs
                    self.processes.gather((None, text))
                else:
                    self.exchange.add(Contribution(has_failed=True), {})
                    self.processes.gather(text)
            raise
        finally:
            self._is_awaited = False

    @property
    def _params(self) -> dict[str, Tensor]:
        """The parameters that this process knows by name, in the param store or from a step."""
        return {**self._last_params, **current_params()}

    def overlapped(self) -> AbstractContextManager[None]:
        """Send gradients during the backward passes of a block, in which the programs run."""
        return self.exchange.overlapped(self._params, lambda: _weight(active_rows()))

    def mean(
        self,
        losses: Losses,
        params: dict[str, Tensor],
        gradients: Gradients,
        rows: list[int] | None = None,
    ) -> tuple[Losses, dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean losses, the parameters with gradients in any process, and their means.

        :param losses: the losses of this process.
        :param params: the parameters that this process has used, by name.
        :param gradients: their gradients in this process, by name.
        :param rows: the numbers of rows in the divided plates. With None, those of the latest run.
        :raises RuntimeError: if the step has failed in another process.
        :raises ValueError: if a loss is not finite.
        """
        rows = active_rows() if rows is None else rows
        late = [name for name, x in params.items() if self._last_params.get(name) is not x]
        self._last_params |= params
        mine = Contribution(_weight(rows), losses, has_new=bool(late), has_several=len(rows) > 1)
        total = self._exchange(mine, gradients, rows)
        means = (total.first_loss, total.second_loss)[: len(losses)]
        if not all(map(math.isfinite, means)):
            found = self.processes.gather(losses)
            bad = [r for r, x in enumerate(found) if not all(map(math.isfinite, x))]
            raise ValueError(
                f"{self.owner}: the loss of step {self._num_steps} is {means[0]}, because of rank "
                f"{', '.join(map(str, bad or [0]))} of {self.processes.size}. Check the data of "
                "this rank, the parameters and the learning rate; this step has not changed the "
                "parameters."
            )
        return means, *self._to_update(total, late)

    def rest(self) -> tuple[float, dict[str, Tensor], dict[str, Tensor]] | None:
        """Take part in a step without data of this process.

        :returns: the loss, and the parameters and gradients of the others; None if none has data.
        """
        self._num_steps += 1
        total = self._exchange(Contribution(has_ended=True), {})
        if total.num_ended == self.processes.size:
            return None
        noise = active_noise() or self._noise
        assert noise is not None  # each process has taken a step before it has no data
        noise.next_step()
        return total.first_loss, *self._to_update(total, ())

    def _to_update(
        self, total: Total, late: Iterable[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the parameters with a gradient in any process, each once, and the gradients."""
        if total.num_with_new:
            wanted = share_params(self.processes, late, self._params)
            now = self._params
            self._last_params |= {name: now[name] for name in wanted if name in now}
        params, seen = self._params, set()
        found: dict[str, Tensor] = {}
        for name, gradient in total.gradients.items():
            if gradient is not None and id(params[name]) not in seen:
                seen.add(id(params[name]))
                found[name] = gradient.to(params[name].device)
        return {name: params[name] for name in found}, found

    def _exchange(
        self, mine: Contribution, gradients: Gradients, rows: list[int] | None = None
    ) -> Total:
        self._is_awaited = False
        mine = replace(mine, is_interrupted=self.has_signal())
        total = self.exchange.add(mine, gradients)
        if total.num_failed:
            self.processes.raise_for(self.processes.gather(None), self.owner)
        self.is_interrupted = total.num_interrupted > 0
        if total.num_with_several:
            found = [x for x in self.processes.gather(rows) if x is not None]
            if any(x != found[0] for x in found):
                raise ValueError(
                    f"{self.owner}: several plates are divided over processes, and the processes "
                    f"have different numbers of rows: {found}. No weight of a process is right for "
                    "all plates. Give each process equally many rows (drop_last=True)."
                )
        return total


def _weight(rows: list[int]) -> float:
    """Return the weight of a process in a mean. Processes with all data are equal."""
    return float(sum(rows)) if rows else 1.0
