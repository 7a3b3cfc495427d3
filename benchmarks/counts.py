"""Operations, kernels and host synchronisations of a training step and of evidence.

They decide the time of small steps on a GPU, and can be counted without one.
"""

import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from benchmarks.counting import CountingMode, cuda_syncs, launched_kernels
from benchmarks.harness import Options, Step, Table
from benchmarks.training_step import objectives
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, estimate_evidence

BATCH_SIZE, K = 20, 50
CHUNK_SIZE, FEW, MANY = 100, 4, 10


def step_of(cls: type[SVI], loss: Any, images: Tensor) -> Step:
    """A step of an SVI with fused Adam, which keeps its step counts on the device."""
    pyro.clear_param_store()
    vae = VAE("vae").to(images.device)
    svi = cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3, "fused": True}), loss)

    def step() -> SVI:
        svi.step(images)
        return svi

    return step


def counted(step: Step, device: torch.device) -> tuple[int, int]:
    """Operations and host synchronisations of a call."""
    with CountingMode(device) as counts:
        step()
    return counts.operations.total(), counts.syncs.total()


def counts_of_step(step: Step, device: torch.device) -> tuple[int, int]:
    """The most frequent counts of many steps, most of which are no captures and no audits."""
    for _ in range(20):
        step()
    return statistics.mode(counted(step, device) for _ in range(15))


def on_cuda(step: Step, device: torch.device) -> list[Any]:
    """What CUDA itself reports of a call: kernels and host synchronisations."""
    if device.type != "cuda":
        return ["-", "-"]
    with cuda_syncs() as syncs:
        step()
    return [launched_kernels(step), len(syncs)]


def tables(options: Options) -> Iterator[Table]:
    """The counts with and without validation of arguments."""
    columns = ["program", "by", "operations", "kernels by Inductor", "host synchronisations"]
    columns += ["kernels by CUDA", "synchronisations by CUDA"]
    table = Table("Counts", columns, chart=(columns[:2], columns[2]))
    images = random_images(BATCH_SIZE, options.device)
    for is_validated in (True, False):
        by = "" if is_validated else ", not validated"
        with pyro.validation_enabled(is_validated):
            for name, objective in objectives(K).items():
                step = step_of(SVI, objective, images)
                found = counts_of_step(step, options.device)
                row = [name, f"SVI{by}", found[0], "-", found[1], *on_cuda(step, options.device)]
                table.rows.append(row)
            table.rows += evidence_rows(f"estimate_evidence{by}", images)
    for name, objective in objectives(K).items():
        step = step_of(CompiledSVI, objective, images)
        found = counts_of_step(step, options.device)
        kernels = step().capture_report().graphs[0].num_kernels
        row = [name, "CompiledSVI", found[0], kernels, found[1], *on_cuda(step, options.device)]
        table.rows.append(row)
    table.note = (
        f"Batch {BATCH_SIZE}, K = {K}, chunks of {CHUNK_SIZE} draws. Operations go through torch's "
        "dispatcher. In a compiled step they are matrix products, random numbers and the "
        "optimiser, and Inductor's kernels come on top. Distributions do not validate their "
        "arguments in a compiled step."
    )
    if options.device.type == "cpu":
        table.note += " A validated step or chunk has two synchronisations less on another device."
    yield table


def evidence_rows(by: str, images: Tensor) -> Iterator[list[Any]]:
    """The counts of a chunk, and those of the rest of a call."""
    vae = VAE("vae").to(images.device)

    def step(num_chunks: int) -> Step:
        settings = {"num_samples": num_chunks * CHUNK_SIZE, "chunk_size": CHUNK_SIZE}
        return lambda: estimate_evidence(
            vae.model, vae.guide, images, max_plate_nesting=1, **settings
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Pareto k")  # the network is not trained
        found = []
        for num_chunks in (1, FEW, MANY):  # the first call makes the parameters
            of_dispatcher = counted(step(num_chunks), images.device)
            found.append([*of_dispatcher, *on_cuda(step(num_chunks), images.device)])
    _, few, many = found
    chunk, rest = [], []
    for a, b in zip(few, many, strict=True):
        slope = "-" if a == "-" else (b - a) / (MANY - FEW)
        chunk.append(slope if a == "-" else round(slope, 1))
        rest.append(slope if a == "-" else round(a - FEW * slope))
    for name, (operations, syncs, *of_cuda) in (("a chunk", chunk), ("the rest of a call", rest)):
        yield [f"evidence, {name}", by, operations, "-", syncs, *of_cuda]
