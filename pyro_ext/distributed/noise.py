from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext._private.of_torch import TorchDispatchMode, is_random, schema_of
from pyro_ext._random_states import RandomStates, seed_torch, set_torch_states, torch_states
from pyro_ext.distributed.processes import current_processes
from pyro_ext.distributed.streams import agreed_seed, seed_of

#: A function that makes a random operation draw in another way, given its arguments.
Draw = Callable[[Any, Any, Any], Any]


class DistributedNoise(Messenger):
    """An effect handler for the random numbers of several processes with a share of the rows each.

    There are two streams of random numbers. A latent site outside of the divided plates is global.
    It draws from the stream that all processes share, so it has the same value in each process. A
    latent site in a divided plate is local. It draws from torch's generator, which has another seed
    in each process. Random numbers outside of sample sites, such as those of dropout, come from
    torch's generator, too.

    :class:`~pyro_ext.infer.EagerSVI` and :class:`~pyro_ext.infer.CompiledSVI` use this handler by
    themselves if ``torch.distributed`` has more than one process. In a loop of your own, make it
    once, and enter it around each step. Each time that it is entered, it begins new random numbers,
    from the seed and the number of the step. A process without data in a step therefore has the
    same numbers as the others in the next.

    With ``per_row=True``, each row of a divided plate has a stream of its own. Row j of rank r is
    row j P + r of the minibatch, as a ``DistributedSampler`` divides them. The draws then do not
    depend on the number of processes P. One run of P processes can so be compared with a run of
    one process, number by number. This is slow.

    :param plates: the name of a divided plate, or the names of several. Plates of which a process
        has fewer rows than their size are added when they come up. Without any, each process has
        all rows, and all sites draw from torch's generator.
    :param seed: the seed of all streams. It must be the same in each process. With None, rank 0
        draws it from torch's generator.
    :param per_row: whether each row has its own stream.
    :raises ValueError: in a step, if ``per_row`` cannot divide the random numbers of a site into
        rows.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_ext.distributed import DistributedNoise
    >>> def guide(x):
    ...     pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", 100, subsample=x):
    ...         return pyro.sample("z", dist.Normal(x, 1.0))
    >>> with DistributedNoise("data", seed=0):
    ...     z = guide(torch.zeros(4))
    >>> z.shape
    torch.Size([4])
    """

    def __init__(
        self, plates: str | Collection[str], seed: int | None = None, per_row: bool = False
    ) -> None:
        super().__init__()
        self.plates = {plates} if isinstance(plates, str) else set(plates)
        processes = current_processes()
        self.rank, self.size = (processes.rank, processes.size) if processes else (0, 1)
        if seed is None:
            seed = agreed_seed(processes) if processes else int(torch.randint(2**62, ()))
        self.seed = seed
        self.per_row = per_row
        self.step = 0
        #: The states of torch's generators that stand for the shared stream; None before its use.
        self._shared_states: RandomStates | None = None
        #: The number of rows of each divided plate in the latest run.
        self.rows: dict[str, int] = {}
        self.seed_stream(seed)

    def __enter__(self) -> Any:
        self.next_step()
        return super().__enter__()

    def next_step(self) -> None:
        """Begin the random numbers of the next step, whatever the last one has used."""
        self.step += 1
        self.rows = {}
        self.seed_stream(seed_of(self.seed, f"step {self.step}"))

    def stream_state(self) -> dict[str, Any]:
        """Return the states of the streams other than torch's generator."""
        return {
            "step": self.step,
            "step_seed": self.step_seed,
            "shared": self._shared_states,
            "num_row_draws": self.num_row_draws,
        }

    def set_stream_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`stream_state` returned."""
        self.step, self.step_seed = state["step"], state["step_seed"]
        self._shared_states, self.num_row_draws = state["shared"], state["num_row_draws"]

    def seed_stream(self, seed: int) -> None:
        """Start these streams anew."""
        self.step_seed = seed
        self._shared_states = None
        self.num_row_draws = 0

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        divided = [frame for frame in msg["cond_indep_stack"] if frame.name in self.plates]
        if not self.plates or (divided and not self.per_row):
            return
        draw: Any = self._draw_shared
        if divided:
            dim = (divided[0].dim or 0) - fn.event_dim
            draw = _RowDraws(self, str(msg["name"]), dim, divided[0].size)
        with Redirected(draw):
            msg["value"] = fn(*msg["args"], **msg["kwargs"])
        msg["done"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if not site_is_subsample(msg):
            return
        fn: Any = msg["fn"]
        value: Any = msg["value"]
        name = str(msg["name"])
        if len(value) < fn.size:
            self.plates.add(name)
        if name in self.plates:
            self.rows[name] = len(value)

    def _draw_shared(self, func: Any, args: Any, kwargs: Any) -> Any:
        outside = torch_states()
        try:
            if self._shared_states is None:
                seed_torch(seed_of(self.step_seed, "shared"))
            else:
                set_torch_states(self._shared_states)
            out = func(*args, **kwargs)
            self._shared_states = torch_states()
            return out
        finally:
            set_torch_states(outside)


class _RowDraws:
    """Draws of a site with a stream for each row.

    :param noise: the handler.
    :param site: the name of the site.
    :param dim: the dim of the rows in a draw, negative.
    :param num_rows: the number of rows in this process.
    """

    def __init__(self, noise: DistributedNoise, site: str, dim: int, num_rows: int) -> None:
        self.noise, self.site, self.dim, self.num_rows = noise, site, dim, num_rows

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        noise = self.noise
        noise.num_row_draws += 1
        outside = torch_states()
        try:
            parts = []
            for j in range(self.num_rows):
                row = j * noise.size + noise.rank
                seed_torch(seed_of(noise.step_seed, f"{noise.num_row_draws} {row}"))
                parts.append(func(*(self._of_row(x, j) for x in args), **kwargs))
        finally:
            set_torch_states(outside)
        return args[0] if schema_of(func).is_mutable else torch.stack(parts, self.dim)

    def _of_row(self, x: Any, j: int) -> Any:
        """Return what an argument of a random operation is for one row."""
        if isinstance(x, Tensor) and x.dim() >= -self.dim:
            if x.shape[self.dim] == self.num_rows:
                return x.select(self.dim, j)
        elif isinstance(x, (list, torch.Size)) and len(x) >= -self.dim:
            if x[self.dim] == self.num_rows:
                position = len(x) + self.dim
                return [*x[:position], *x[position + 1 :]]
        elif not isinstance(x, (Tensor, list)):
            return x
        raise ValueError(
            f"DistributedNoise: the random numbers of site '{self.site}' cannot be divided into "
            f"{self.num_rows} rows. Use per_row=False."
        )


class Redirected(TorchDispatchMode):
    """A mode in which random operations draw in another way.

    :param draw: the function that draws for them.
    """

    #: A function that takes the place of ``draw``, such as a recorder of operations.
    listener: ClassVar[Callable[[Any, Any, Any, Draw], Any] | None] = None

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        if Redirected.listener is not None:
            return Redirected.listener(func, args, kwargs, self.draw)
        return self.draw(func, args, kwargs)


def active_noise() -> DistributedNoise | None:
    """Return the active :class:`DistributedNoise`, or None."""
    return next((x for x in HANDLER_STACK if isinstance(x, DistributedNoise)), None)


def active_rows() -> list[int]:
    """Return the numbers of rows that this process has in the divided plates.

    They are those of the last run of the programs in this step. The list is empty if no plate is
    divided.
    """
    noise = active_noise()
    return [] if noise is None else [*noise.rows.values()]
