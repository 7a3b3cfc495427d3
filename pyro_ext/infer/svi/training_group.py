"""What several processes do together while each trains the same model and guide."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from pyro_ext._random_states import kept_random_states, random_states, seed_all
from pyro_ext.distributed.gradients import Contribution, GradientExchange, Total
from pyro_ext.distributed.loaders import with_share_of_rows
from pyro_ext.distributed.noise import DistributedNoise, active_noise, active_rows
from pyro_ext.distributed.packing import Gradients
from pyro_ext.distributed.processes import Processes, describe_error
from pyro_ext.distributed.streams import agreed_seed, seed_of
from pyro_ext.infer.svi.capture.graph_inputs import current_params
from pyro_ext.infer.svi.equal_programs import SharedParams, divided_plates

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
        self._shared_params = SharedParams(processes)
        self._saved: dict[str, Any] | None = None
        #: Returns whether this process has received a signal to end.
        self.has_signal: Callable[[], bool] = lambda: False
        #: Whether a process had received a signal to end before the latest step.
        self.is_interrupted = False
        self._is_awaited = False
        self._num_steps = 0
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
        plates = divided_plates(svi, self.processes, self.owner, args, kwargs)
        self._noise = DistributedNoise(plates, self.seed)
        if self._saved is None:
            seed_all(seed_of(self.seed, self.processes.rank))
        elif self._saved["noise"] is not None:
            self._noise.set_stream_state(self._saved["noise"])

    @cached_property
    def seed(self) -> int:
        """The seed of all streams of random numbers, and of the order of the rows."""
        if self._saved is not None:
            return int(self._saved["seed"])
        with kept_random_states():  # new parameters get the values of a run of one process
            return agreed_seed(self.processes)

    def state(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds beside the state of rank 0.

        :param own: the random states of this process.
        """
        return {
            "seed": self.seed,
            "noise": self._noise and self._noise.stream_state(),
            "ranks": self.processes.gather(own),
        }

    def load(self, state: dict[str, Any] | None, own: dict[str, Any]) -> dict[str, Any]:
        """Continue from a checkpoint.

        :param state: the result of :meth:`state`; None if one process has saved the checkpoint.
        :param own: the random states of the process that has saved it.
        :returns: the random states of this process. If there were more processes or fewer, they
            come from those of rank 0.
        """
        self._saved = state
        if state is not None and len(state["ranks"]) == self.processes.size:
            return dict(state["ranks"][self.processes.rank])
        with kept_random_states():
            seed_all(seed_of(int(own["random"]["cpu"].long().sum()), self.processes.rank))
            return {**own, "random": random_states()}

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0."""
        return self.processes.rank == 0

    def agree(self, owner: str, check: Callable[[], None], resume: Any) -> Any:
        """Check the arguments of a run in each process.

        :param owner: the name of the method, for messages.
        :param check: the check.
        :param resume: the checkpoint from which this process would continue.
        :returns: the checkpoint from which rank 0 continues.
        """

        def checked() -> Any:
            check()
            return resume

        return self.processes.share(checked, owner)[0]

    def data_of_process(self, owner: str, data: Any) -> Any:
        """Return data whose minibatches hold the rows of this process."""
        seed, found = self.seed % 2**32, []

        def divide() -> None:
            found.append(with_share_of_rows(owner, data, self.processes, seed))

        self.processes.share(divide, owner)
        return found[0]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a step. If it fails in one process, it fails in all of them."""
        self._num_steps += 1
        own: Any = self._noise if active_noise() is None else nullcontext()
        with self.awaited(), own, self._shared_params:
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
    ) -> tuple[Losses, dict[str, Tensor], dict[str, Tensor | None]]:
        """Return the mean losses, the parameters with gradients in any process, and their means.

        :param losses: the losses of this process.
        :param params: the parameters that this process has used, by name.
        :param gradients: their gradients in this process, by name.
        :param rows: the numbers of rows in the divided plates. With None, those of the latest run.
        :raises RuntimeError: if the step has failed in another process.
        :raises ValueError: if a loss is not finite.
        """
        rows = active_rows() if rows is None else rows
        mine = Contribution(_weight(rows), losses)
        total = self._exchange(mine, gradients)
        self._check_rows(total, len(rows))
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
        self._last_params |= params
        if not params.keys() >= total.gradients.keys():
            params = {**self._params, **params}
        used = {name: params[name] for name, x in total.gradients.items() if x is not None}
        return means, {**params, **used}, total.gradients

    def rest(self) -> tuple[float, dict[str, Tensor], dict[str, Tensor | None]] | None:
        """Take part in a step without data of this process.

        :returns: the loss, parameters and gradients of the others; None if none has data.
        """
        self._num_steps += 1
        total = self._exchange(Contribution(has_ended=True), {})
        if total.num_ended == self.processes.size:
            return None
        noise = active_noise() or self._noise
        assert noise is not None  # each process has taken a step before it has no data
        noise.next_step()
        params = self._params
        gradients = {
            name: x if x is None else x.to(params[name].device)
            for name, x in total.gradients.items()
        }
        return total.first_loss, params, gradients

    def _exchange(self, mine: Contribution, gradients: Gradients) -> Total:
        self._is_awaited = False
        mine = replace(mine, is_interrupted=self.has_signal())
        total = self.exchange.add(mine, gradients)
        if total.num_failed:
            self.processes.raise_for(self.processes.gather(None), self.owner)
        self.is_interrupted = total.num_interrupted > 0
        return total

    def _check_rows(self, total: Total, num_plates: int) -> None:
        """Raise a ValueError if no weight of a process is right for all plates."""
        num_active = self.processes.size - total.num_ended
        is_even = math.isclose(num_active * total.squares, total.weight**2, rel_tol=1e-4)
        if num_plates > 1 and not is_even:
            raise ValueError(
                f"{self.owner}: several plates are divided over processes, and the processes have "
                "different numbers of rows. Give each process equally many rows (drop_last=True)."
            )


def _weight(rows: list[int]) -> float:
    """Return the weight of a process in a mean. Processes with all data are equal."""
    return float(sum(rows)) if rows else 1.0
