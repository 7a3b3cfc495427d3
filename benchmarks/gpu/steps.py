"""The training step at sizes for a GPU, beside its matrix products and the step by hand."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from benchmarks import bfloat16
from benchmarks.gpu.clock import Clock
from benchmarks.harness import Options, Step, Table, compare, peak_bytes
from benchmarks.plain_steps import matmuls, plain_step
from benchmarks.training_step import QUICK, Means, objectives, pyro_step
from benchmarks.vae import random_images
from pyro_ext.infer import CompiledSVI

SIZES = (20, 5), (20, 50), (100, 50), (1024, 50), (4096, 1), (4096, 50), (100, 500)
SIZES_OF_OBJECTIVES = (20, 50), (1024, 50)
REHEARSAL = (2, 2), (3, 2)
COMPILED = "CompiledSVI"
CUDA_GRAPHS = "CompiledSVI, CUDA graphs"


def implementations(images: Tensor, K: int) -> dict[str, Callable[[], Step]]:
    """What makes each step; the floor is first."""
    elbo, *_ = objectives(K).values()
    of_pyro = partial(pyro_step, loss=elbo, images=images)
    compiled = partial(of_pyro, CompiledSVI, fallback=False)
    return {
        "matmuls alone": partial(matmuls, images, K),
        "hand-written": partial(plain_step, images, K),
        "hand-written + torch.compile": partial(plain_step, images, K, is_compiled=True),
        COMPILED: partial(compiled, name="compiled"),
        CUDA_GRAPHS: partial(compiled, name="graphs", mode="reduce-overhead"),
        "SVI": partial(of_pyro, SVI, name="eager"),
    }


def compiled_objectives(images: Tensor, K: int) -> dict[str, Callable[[], Step]]:
    """What makes the compiled step of each gradient rule, and of the jackknife."""
    found = list(objectives(K).items())[:4]
    return {
        name: partial(pyro_step, CompiledSVI, loss, images, f"objective{i}", fallback=False)
        for i, (name, loss) in enumerate(found)
    }


def made(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that run, after a first call, and the errors of the others."""
    steps, errors = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
            steps[name]()
        except Exception as error:  # such as too little memory
            steps.pop(name, None)
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return steps, errors


def fresh_images(batch_size: int, device: torch.device) -> Tensor:
    """Images, after what belongs to other sizes has been freed."""
    pyro.clear_param_store()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return random_images(batch_size, device)


def measure(
    table: Table,
    means: Means,
    makers: Callable[[Tensor, int], dict[str, Callable[[], Step]]],
    sizes: tuple[tuple[int, int], ...],
    options: Options,
    clock: Clock,
) -> Iterator[Table]:
    """Yields the table after each size."""
    left_out: list[tuple[int, int]] = []
    failed: list[str] = []
    for size in clock.select(REHEARSAL if clock.is_rehearsal else sizes, left_out):
        steps, errors = made(makers(fresh_images(size[0], options.device), size[1]))
        failed += [f"{name} at {size}: {error}" for name, error in errors.items()]
        found = compare(steps, options)
        means.add(size, found)
        for name, times in found.items():
            peak = peak_bytes(steps[name], options.device) / 2**20
            table.rows.append([*size, name, *times, peak])
        del steps
        yield table
    notes = [f"Left out for lack of time: {', '.join(map(str, left_out))}."] if left_out else []
    table.note = " ".join([*notes, *(f"No figure for {text}." for text in failed)])
    yield table


def training_steps(options: Options, clock: Clock) -> Iterator[Table | str]:
    """Times and memory, and means as in the table of a CPU."""
    columns = ["batch", "K", "step", "ms", "ratio to matmuls alone", "peak MiB"]
    table = Table("Training step", columns, chart=(columns[:3], columns[4]))
    means = Means()
    yield from measure(table, means, implementations, SIZES, options, clock)
    for own in (COMPILED, CUDA_GRAPHS):
        if sizes := [size for size in QUICK if size in means.times.get(own, {})]:
            yield ratios_of(own, means, sizes)


def ratios_of(own: str, means: Means, sizes: Sequence[tuple[int, int]]) -> str:
    """The mean ratios to the other steps."""
    others = [name for name in means.times if name != own]
    found = [f"{means.ratio(own, name, sizes):.2f} for {name}" for name in others]
    return (
        f"Time of {own} over that of another step: {', '.join(found)} (geometric mean "
        f"over (batch, K) = {', '.join(map(str, sizes))})."
    )


def other_objectives(options: Options, clock: Clock) -> Iterator[Table]:
    """Compiled steps over the compiled pathwise step."""
    columns = ["batch", "K", "step", "ms", "ratio to pathwise", "peak MiB"]
    table = Table("Other objectives, compiled", columns, chart=(columns[:3], columns[4]))
    yield from measure(table, Means(), compiled_objectives, SIZES_OF_OBJECTIVES, options, clock)


def compile_ahead(device: torch.device, is_rehearsal: bool) -> None:
    """Makes the steps of later parts, so that the compiler's cache on disk has them."""
    for makers, sizes in (
        (implementations, SIZES),
        (compiled_objectives, SIZES_OF_OBJECTIVES),
    ):
        for size in REHEARSAL if is_rehearsal else sizes:
            made(makers(fresh_images(size[0], device), size[1]))
    bfloat16.times(Options(device, quick=True, seconds=0.01))
