"""A training step of the importance-weighted VAE, over the same maths in plain PyTorch."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor

from benchmarks import numpyro_step
from benchmarks.harness import (
    Options,
    Spread,
    Step,
    Table,
    compare,
    geometric_mean,
    peak_bytes,
)
from benchmarks.plain_steps import matmuls, plain_step
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO, JackknifeELBO

SMALL = 20, 1
QUICK = ((20, 5), (20, 50), (100, 50))
MEAN = "as a geometric mean over (batch, K) = " + ", ".join(map(str, QUICK))
#: Above so many rows of 784 pixels a step does not fit into a usual machine's memory.
MOST_ROWS = {"cpu": 50_000, "cuda": 500_000}
#: Steps that are no program of torch, or make no tensors.
WITHOUT_MEMORY = "NumPyro", "matmuls alone"


def pyro_step(cls: type[SVI], loss: object, images: Tensor, name: str, **options: Any) -> Step:
    """A step of an SVI on a network of its own."""
    vae = VAE(name).to(images.device)
    svi = cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss, **options)
    svi.step(images)
    return lambda: svi.step(images)


def renyi(num_particles: int) -> RenyiELBO:
    """Pyro's own importance-weighted bound."""
    return RenyiELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


def settings(options: Options) -> Iterator[tuple[int, int]]:
    """Batch sizes and numbers of particles."""
    if options.quick:
        yield from (SMALL, *QUICK)
        return
    for batch_size in (20, 100, 1000):
        for K in (1, 5, 50, 500):
            if batch_size * K <= MOST_ROWS[options.device.type]:
                yield batch_size, K


class Means:
    """Times by step and by batch and K, and their geometric means for the notes below tables."""

    def __init__(self) -> None:
        self.times: dict[str, dict[tuple[int, int], float]] = {}

    def add(self, size: tuple[int, int], found: Mapping[str, tuple[Spread, Spread]]) -> None:
        """Adds the median times at a size."""
        for name, (milliseconds, _) in found.items():
            self.times.setdefault(name, {})[size] = milliseconds.median

    def ratio(self, above: str, below: str, sizes: Sequence[tuple[int, int]] = QUICK) -> float:
        """The mean ratio of two steps over those sizes at which there are both."""
        one, other = self.times.get(above, {}), self.times.get(below, {})
        return geometric_mean([one[s] / other[s] for s in sizes if s in one and s in other])


def tables(options: Options) -> Iterator[Table]:
    """Time and memory of each implementation, and the times of other objectives."""
    columns = ["batch", "K", "step", "ms", "ratio to hand-written", "peak MiB"]
    table = Table("Training step", columns, chart=(("batch", "K", "step"), columns[4]))
    first_calls = []
    means = Means()
    for size in settings(options):
        images = random_images(size[0], options.device)
        pyro.clear_param_store()
        steps, seconds = implementations(images, size[1])
        first_calls.append(seconds)
        found = compare(steps, options)
        means.add(size, found)
        for name, (milliseconds, ratio) in found.items():
            has_memory = name not in WITHOUT_MEMORY
            peak = peak_bytes(steps[name], options.device) / 2**20 if has_memory else "-"
            table.rows.append([*size, name, milliseconds, ratio, peak])
    others = [name for name in means.times if name != "CompiledSVI"]
    floor = means.ratio("CompiledSVI", "matmuls alone", [SMALL])
    table.note = (
        f"Time of the compiled step, divided by the time of another step, {MEAN}: "
        + ", ".join(f"{means.ratio('CompiledSVI', x):.2f} for {x}" for x in others)
        + f". At (20, 1) it is {floor:.2f} for matmuls alone. The first call compiles and takes "
        f"{min(first_calls):.1f} to {max(first_calls):.1f} s."
    )
    yield table
    for title, cls in (("compiled", CompiledSVI), ("eager", SVI)):
        yield other_objectives(title, cls, options)


def implementations(images: Tensor, K: int) -> tuple[dict[str, Step], float]:
    """The steps by name, hand-written first, and the seconds of the first call that compiles."""

    def elbo() -> ImportanceWeightedELBO:
        return ImportanceWeightedELBO(K, max_plate_nesting=1)

    trace = Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    steps = {
        "hand-written": plain_step(images, K),
        "matmuls alone": matmuls(images, K),
        "hand-written + torch.compile": plain_step(images, K, is_compiled=True),
    }
    start = time.perf_counter()
    steps["CompiledSVI"] = pyro_step(CompiledSVI, elbo(), images, "compiled")
    seconds = time.perf_counter() - start
    steps["SVI"] = pyro_step(SVI, elbo(), images, "eager")
    steps["SVI, Trace_ELBO"] = pyro_step(SVI, trace, images, "trace")
    if K > 1:
        steps["SVI, RenyiELBO"] = pyro_step(SVI, renyi(K), images, "renyi")
    if numpyro_step.is_installed():
        steps["NumPyro"] = numpyro_step.make_step(images.cpu().numpy(), K)
    return steps, seconds


def objectives(K: int) -> dict[str, Any]:
    """The importance-weighted bound under each gradient rule, and the jackknife if K > 1."""
    found: dict[str, Any] = {
        f'importance-weighted, "{rule}"': ImportanceWeightedELBO(
            K, gradient=rule, max_plate_nesting=1
        )
        for rule in ("pathwise", "dreg", "stl")
    }
    if K == 1:
        return found
    found["jackknife, order 1"] = JackknifeELBO(K, 1, max_plate_nesting=1)
    found["jackknife, order 1, as published"] = JackknifeELBO(
        K, 1, "jackknife", "published", max_plate_nesting=1
    )
    return found


def other_objectives(title: str, cls: type[SVI], options: Options) -> Table:
    """Steps of other gradient rules and of the jackknife, over the usual one."""
    columns = ["batch", "K", "step", "ms", "ratio to pathwise"]
    table = Table(f"Other objectives, {title}", columns, chart=(columns[:3], columns[4]))
    means = Means()
    for size in QUICK:
        images = random_images(size[0], options.device)
        pyro.clear_param_store()
        steps = {
            name: pyro_step(cls, loss, images, f"{title}{i}")
            for i, (name, loss) in enumerate(objectives(size[1]).items())
        }
        found = compare(steps, options)
        means.add(size, found)
        table.rows += [[*size, name, *times] for name, times in found.items()]
    base, *names = means.times
    table.note = (
        f"Time of a step, divided by the time of the pathwise step, {MEAN}: "
        + ", ".join(f"{means.ratio(name, base):.2f} for {name}" for name in names)
        + "."
    )
    return table
