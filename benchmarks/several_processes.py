"""Training steps of several processes of one thread each: time, messages, and a model on paper.

All processes live at the same time and take turns: one or two without a group, and groups of one
and of two. Two without a group show how much processes slow down each other on this machine. Each
process has its own rows, as many as the others. This runs on the CPU.
"""

import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pyro
import torch
from torch import Tensor, distributed, multiprocessing

from benchmarks.harness import Options, Spread, Table
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, EagerSVI, ImportanceWeightedELBO

SETTINGS = ((20, 5), (100, 50))
SVIS = {"compiled": CompiledSVI, "eager": EagerSVI}
#: The number of processes that take steps together, and whether they have a group.
TEAMS = {
    "one": (1, False),
    "group of one": (1, True),
    "two": (2, False),
    "group of two": (2, True),
}
COLLECTIVES = ("all_reduce", "broadcast", "all_gather")
STEPS_IN_A_TURN = 10


class Network(NamedTuple):
    """A network between machines."""

    name: str
    bytes_per_second: float
    latency: float


NETWORKS = (
    Network("25 Gbit/s Ethernet, 30 us", 25e9 / 8, 30e-6),
    Network("200 Gbit/s InfiniBand, 5 us", 200e9 / 8, 5e-6),
)


class ManyImagesVAE(VAE):
    """The autoencoder for minibatches of more images."""

    def plate(self, x: Tensor) -> pyro.plate:
        """The plate of 60,000 images."""
        return pyro.plate("data", 60_000, subsample=x)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Yield the list to which each message between processes adds its bytes."""
    found: list[int] = []

    def counted(send: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            x = next(x for x in args if isinstance(x, Tensor))
            found.append(x.numel() * x.element_size())
            return send(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            send = getattr(distributed, name)
            stack.enter_context(patch.object(distributed, name, counted(send)))
        yield found


def expected_bytes(sizes: list[int]) -> int:
    """The bytes of a step: nine numbers, one flag a tensor, and the gradients in float32."""
    return 4 * (9 + len(sizes) + sum(sizes))


class Trainer:
    """What a process does when it is told to."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def set_up(self, batch_size: int, num_particles: int, svi: str) -> None:
        """Take the first steps, with compilation."""
        pyro.clear_param_store()
        pyro.set_rng_seed(self.rank)
        vae = ManyImagesVAE("vae")
        elbo = ImportanceWeightedELBO(num_particles, max_plate_nesting=1)
        self.svi = SVIS[svi](vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-4}), elbo)
        self.images = random_images(batch_size, torch.device("cpu"))
        for _ in range(5):
            self.svi.step(self.images)

    def seconds(self) -> float:
        """The median time of a step."""
        ends = [time.perf_counter()]
        for _ in range(STEPS_IN_A_TURN):
            self.svi.step(self.images)
            ends.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(ends))

    def messages(self) -> tuple[list[int], list[int]]:
        """The bytes of each message of a step, and the sizes of the parameters."""
        with counted_bytes() as found:
            self.svi.step(self.images)
        return found, [x.numel() for _, x in pyro.get_param_store().named_parameters()]


def work(pipe: Any, rank: int, size: int, has_group: bool, folder: str) -> None:
    """Do what comes through a pipe, in a process of a team."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if has_group:
        path = f"file://{folder}/{size}"
        distributed.init_process_group("gloo", path, rank=rank, world_size=size)
    trainer = Trainer(rank)
    while (task := pipe.recv()) is not None:
        name, args = task
        pipe.send(getattr(trainer, name)(*args))
    if has_group:
        distributed.destroy_process_group()


class Team:
    """Processes that take their steps at the same time."""

    def __init__(self, size: int, has_group: bool, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = there, rank, size, has_group, folder
            context.Process(target=work, args=arguments, daemon=True).start()
            self.pipes.append(here)

    def call(self, name: str, *args: Any) -> Any:
        """The result of rank 0 of a method of :class:`Trainer`, which all ranks call."""
        for pipe in self.pipes:
            pipe.send((name, args))
        first, *_ = [pipe.recv() for pipe in self.pipes]
        return first

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)


def times_in_turns(teams: dict[str, Team], options: Options) -> dict[str, list[float]]:
    """The times of a step of each team, in rounds."""
    found: dict[str, list[float]] = {name: [] for name in teams}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(found["one"]) < 5:
        for name in random.sample(list(teams), len(teams)):
            found[name].append(teams[name].call("seconds"))
    return found


def ratios(above: list[float], below: list[float]) -> Spread:
    """The ratios within rounds."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def efficiency(compute: float, num_bytes: int, size: int, network: Network, hops: float) -> float:
    """The time of the computation over that of the step, if nothing overlaps."""
    sent = 2 * (size - 1) / size * num_bytes
    return compute / (compute + hops * network.latency + sent / network.bytes_per_second)


def on_paper(compute: dict[tuple[int, int], float], num_bytes: int) -> Table:
    """The efficiencies of many processes, with a ring and with a tree."""
    columns = ["network", "batch", "K", "processes", "efficiency, ring", "efficiency, tree"]
    table = Table("Many processes, on paper", columns, chart=(columns[:4], columns[5]))
    for network in NETWORKS:
        for (batch_size, K), seconds in compute.items():
            for size in (8, 64, 512):
                hops = 2 * (size - 1), 2 * math.log2(size)
                found = [efficiency(seconds, num_bytes, size, network, n) for n in hops]
                table.rows.append([network.name, batch_size, K, size, *found])
    table.note = (
        "This is not a measurement. Assumptions: the time of the computation is that of a compiled "
        "step without a group; all processes are equally fast; each has a network link of its own; "
        "communication and computation do not overlap; an all-reduce of n bytes by P processes "
        "sends 2 (P - 1) / P n bytes per process, with a latency for each of 2 (P - 1) hops in a "
        "ring, or of 2 log2(P) hops in a tree."
    )
    return table


def tables(options: Options) -> Iterator[Table]:
    """Measured steps and messages of two processes, and many processes on paper."""
    columns = ["batch", "K", "SVI", *(f"ms, {name}" for name in TEAMS)]
    columns += ["group of one / one", "one / group of two", "one / two", "two / group of two"]
    steps = Table("Several processes", columns, chart=(columns[:3], columns[-1]))
    columns = ["SVI", "parameters", "tensors", "messages", "bytes", "bytes by the formula"]
    sent = Table("Messages of a step", columns, chart=(columns[:1], columns[4]))
    compute: dict[tuple[int, int], float] = {}
    num_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        teams = {name: Team(*team, folder) for name, team in TEAMS.items()}
        for batch_size, K in SETTINGS:
            for svi in SVIS:
                for team in teams.values():
                    team.call("set_up", batch_size, K, svi)
                times = times_in_turns(teams, options)
                one, group_of_one, two, group_of_two = times.values()
                pairs = (group_of_one, one), (one, group_of_two), (one, two), (two, group_of_two)
                found = [ratios(*pair) for pair in pairs]
                medians = [1e3 * statistics.median(x) for x in times.values()]
                steps.rows.append([batch_size, K, svi, *medians, *found])
                if svi == "compiled":
                    compute[batch_size, K] = statistics.median(one)
                if (batch_size, K) == SETTINGS[-1]:
                    messages, sizes = teams["group of two"].call("messages")
                    num_bytes = sum(messages)
                    row = [sum(sizes), len(sizes), len(messages), num_bytes, expected_bytes(sizes)]
                    sent.rows.append([svi, *row])
        for team in teams.values():
            team.close()
    steps.note = (
        "One thread and the same number of rows per process. One / group of two is the efficiency. "
        "It is the product of the last two columns: how far this machine runs two processes as "
        "fast as one, and how far a group of two is as fast as two processes without a group."
    )
    sent.note = (
        "The formula is 4 (parameters + tensors + 9). With P processes, a ring sends "
        "2 (P - 1) / P times as many bytes per process."
    )
    yield steps
    yield sent
    yield on_paper(compute, num_bytes)
