"""Calls of one function in all processes, which divide its work."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from pyro_ext._arguments import describe
from pyro_ext._interruption import Interrupts, postponed_interrupts
from pyro_ext._random_states import (
    RandomStates,
    kept_random_states,
    random_states,
    set_random_states,
)
from pyro_ext.distributed.processes import (
    Processes,
    current_processes,
    describe_error,
    separate_processes,
)
from pyro_ext.distributed.streams import agreed_seed, seed_stream
from pyro_ext.distributed.summaries import named_arguments, parameters, summary

T = TypeVar("T")


class JointCall:
    """A call of one function in all processes, or in a single process that works alone.

    All messages are gathered with the error of each process. If a process leaves
    :func:`joint_call` with an error, the next message of the others raises an error, too. The
    processes need not agree on which message this is.

    :param owner: the name of the function, for messages.
    :param interrupts: the interrupts of this process, which wait for the end of a part.
    :param processes: the processes; None for a single process.
    :param seed: the seed of all random numbers of the call. A single process has no use for it.

    :ivar rank: the rank of this process.
    :ivar size: the number of processes P >= 1.
    """

    def __init__(
        self,
        owner: str,
        interrupts: Interrupts,
        processes: Processes | None = None,
        seed: int = 0,
    ) -> None:
        self.owner = owner
        self.interrupts = interrupts
        self.rank, self.size = (processes.rank, processes.size) if processes else (0, 1)
        self._processes = processes
        self._seed = seed
        self._is_over = False

    def alone(self) -> "JointCall":
        """Return the same call for a piece of work that this process does by itself."""
        return JointCall(self.owner, self.interrupts)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank.

        :param value: the value of this process.
        :raises RuntimeError: if another process has left the call with an error.
        """
        return [value] if self._processes is None else self._exchange(value, None)

    def end(self, error: BaseException | None) -> None:
        """Tell the other processes that this one leaves the call, with or without an error."""
        if self._processes is not None and not self._is_over:
            self._exchange(None, error)

    def _exchange(self, value: Any, error: BaseException | None) -> list[Any]:
        assert self._processes is not None
        is_over, self._is_over = self._is_over, True
        found = self._processes.gather((describe_error(error), value))
        if error is None:
            self._processes.raise_for([text for text, _ in found], self.owner)
        self._is_over = is_over
        return [value for _, value in found]

    def share(self, remaining: int, most: int) -> list[int]:
        """Return how many of the remaining draws this process makes in the next round.

        :param remaining: the number of remaining draws of all processes.
        :param most: the largest number of draws of a process in a round.
        :returns: a list with the number. It is empty if the process has no draws in this round.
        """
        number, rest = divmod(min(remaining, self.size * most), self.size)
        number += self.rank < rest
        return [number] if number else []

    def parts(self, work: Iterable[T]) -> Iterator[T]:
        """Do a round of work, and yield the results of all processes, by rank.

        After an interrupt of any process, this raises ``KeyboardInterrupt`` in all processes, once
        it has yielded the results so far.

        :param work: the work of this process, whose last value is its result. A process without a
            value has no result.
        """
        results: list[T] = []
        stop: KeyboardInterrupt | None = None
        try:
            for result in work:
                results = [result]
            self.interrupts.deliver()
        except KeyboardInterrupt as error:
            if self.interrupts:  # this is a second interrupt
                raise
            stop = error
        found = self.gather((results, stop is not None))
        del results
        for of_process, _ in found:
            yield from of_process
        if any(is_stopped for _, is_stopped in found):
            if stop is None:
                with suppress(KeyboardInterrupt):  # of this process, since its work
                    self.interrupts.deliver()
            raise stop or KeyboardInterrupt

    def use_own_random_numbers(self, seed: int | None = None) -> None:
        """Give each process other random numbers, until the end of the call.

        :param seed: the seed from which they are derived; None for the seed of the call.
        """
        if self._processes is not None:
            seed_stream(self._seed if seed is None else seed, self.rank)

    def drawn(self, items: Iterable[T], stream: str | int) -> Iterator[T]:
        """Yield items that may draw random numbers when they are made, from a stream of their own.

        :param items: the items.
        :param stream: the name of the stream. Processes with the same name make the same items.
        """
        states: RandomStates | None = None
        iterator: Iterator[T] | None = None
        while True:
            with kept_random_states():
                if states is None:
                    seed_stream(self._seed, stream)
                else:
                    set_random_states(states)
                iterator = iter(items) if iterator is None else iterator
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                states = random_states()
            yield item

    def check_inputs(self, programs: Any, settings: Mapping[str, Any], **others: Any) -> None:
        """Raise a ValueError in all processes if they do not have the same inputs.

        :param programs: the model and guide with their arguments.
        :param settings: numbers and strings that the user has set, by their names.
        :param others: other values that the user has passed.
        """
        if self._processes is None:
            return
        found = self.gather(settings)
        for rank, of_rank in enumerate(found):
            for name, value in found[0].items():
                if repr(of_rank[name]) != repr(value):
                    raise ValueError(
                        f"{self.owner}: {name} is {describe(of_rank[name])} on rank {rank}, but "
                        f"{describe(value)} on rank 0. Pass the same on each rank, because the "
                        "processes divide the work."
                    )
        self.check_values(
            lambda: {**named_arguments(programs.model, programs.args, programs.kwargs), **others},
            f"{self.owner} divides the work by itself. Pass the same arguments, with all data, on "
            "each rank.",
        )

    def check_parameters(self, programs: Any) -> None:
        """Raise a ValueError in all processes if parameters are not the same in all of them.

        :param programs: the model and guide. A process that runs neither passes None, and its
            parameters do not matter.
        """
        self.check_values(
            lambda: {} if programs is None else parameters(programs.model, programs.guide),
            "Train, or load the parameters, on each rank in the same way.",
        )

    def check_values(self, values: Callable[[], Mapping[str, Any]], advice: str) -> None:
        """Raise a ValueError in all processes if a value is not the same in all of them.

        A part of the entries stands for each large tensor. Processes without values do not count.

        :param values: a function that returns the values, by their descriptions.
        :param advice: the last sentence of the message.
        """
        if self._processes is None:
            return
        found = self.gather({label: summary(value) for label, value in values().items()})
        known = [(rank, of_rank) for rank, of_rank in enumerate(found) if of_rank]
        for rank, of_rank in known:
            first, expected = known[0]
            for label in expected | of_rank:
                if of_rank.get(label) != expected.get(label):
                    raise ValueError(
                        f"{self.owner}: the {label} of rank {rank} is not that of rank {first}. "
                        f"{advice}"
                    )


@contextmanager
def joint_call(owner: str, *, postpones_interrupts: bool = True) -> Iterator[JointCall]:
    """Enter a call of a function in all processes of the default group, if there is one.

    An error of one process is an error of all. All processes draw the same random numbers until
    :meth:`JointCall.use_own_random_numbers`. After the call, the generators continue from where
    they were. Without a group, nothing changes. Enter this context before all others.

    :param owner: the name of the function.
    :param postpones_interrupts: whether an interrupt waits for the end of a part.
    """
    with ExitStack() as stack:
        interrupts = Interrupts({})
        if postpones_interrupts:
            interrupts = stack.enter_context(postponed_interrupts())
        processes = current_processes()
        if processes is None:
            yield JointCall(owner, interrupts)
            return
        seed = agreed_seed(processes)
        call = JointCall(owner, interrupts, processes, seed)
        stack.enter_context(kept_random_states())
        stack.enter_context(separate_processes())
        seed_stream(seed, "all")
        try:
            yield call
        except BaseException as error:
            with suppress(RuntimeError):  # the error of this process says more
                call.end(error)
            raise
        call.end(None)
