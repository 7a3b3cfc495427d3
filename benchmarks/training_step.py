"""A training step of the importance-weighted VAE, over the same maths in plain PyTorch."""

import math
import time
from collections.abc import Iterator

import pyro
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks import numpyro_step
from benchmarks.harness import Options, Step, Table, compare, geometric_mean, peak_bytes
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO, JackknifeELBO

QUICK = ((20, 5), (20, 50), (100, 50))
#: Above so many rows of 784 pixels a step does not fit into a usual machine's memory.
MOST_ROWS = {"cpu": 50_000, "cuda": 500_000}


def plain_step(images: Tensor, num_particles: int) -> Step:
    """The step as one writes it in PyTorch, with fused Adam."""
    vae = VAE("plain").to(images.device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    constant = math.log(2 * math.pi) / 2

    def step() -> float:
        optimizer.zero_grad()
        loc, log_scale = vae.encoder(images).chunk(2, -1)
        noise = torch.randn(num_particles, *loc.shape, device=images.device)
        z = loc + log_scale.exp() * noise
        logits = vae.decoder(z)
        log_likelihood = -binary_cross_entropy_with_logits(
            logits, images.expand_as(logits), reduction="none"
        ).sum(-1)
        log_prior = (-z.square() / 2 - constant).sum(-1)
        log_q = (-noise.square() / 2 - log_scale - constant).sum(-1)
        log_w = log_likelihood + log_prior - log_q
        loss = -(log_w.logsumexp(0) - math.log(num_particles)).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def pyro_step(cls: type[SVI], loss: object, images: Tensor, name: str) -> Step:
    """A step of an SVI on a network of its own."""
    vae = VAE(name).to(images.device)
    svi = cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    svi.step(images)
    return lambda: svi.step(images)


def renyi(num_particles: int) -> RenyiELBO:
    """Pyro's own importance-weighted bound."""
    return RenyiELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


def settings(options: Options) -> Iterator[tuple[int, int]]:
    """Batch sizes and numbers of particles."""
    if options.quick:
        yield from QUICK
        return
    for batch_size in (20, 100, 1000):
        for K in (1, 5, 50, 500):
            if batch_size * K <= MOST_ROWS[options.device.type]:
                yield batch_size, K


def tables(options: Options) -> Iterator[Table]:
    """Time and memory of each implementation, and of two other objectives."""
    columns = ["batch", "K", "step", "ms", "ratio to plain PyTorch", "peak MiB"]
    table = Table(
        "Training step", columns, chart=(("batch", "K", "step"), "ratio to plain PyTorch")
    )
    ratio = "ratio to the compiled importance-weighted step"
    others = Table(
        "Other objectives, compiled",
        ["batch", "K", "step", "ms", ratio],
        chart=(("batch", "K", "step"), ratio),
    )
    first_calls = []
    ratios: dict[str, list[float]] = {}
    for batch_size, K in settings(options):
        images = random_images(batch_size, options.device)
        pyro.clear_param_store()
        steps = {"plain PyTorch": plain_step(images, K)}
        start = time.perf_counter()
        steps["CompiledSVI"] = pyro_step(
            CompiledSVI, ImportanceWeightedELBO(K, max_plate_nesting=1), images, "compiled"
        )
        first_calls.append(time.perf_counter() - start)
        steps["SVI"] = pyro_step(
            SVI, ImportanceWeightedELBO(K, max_plate_nesting=1), images, "eager"
        )
        trace = Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
        steps["SVI, Trace_ELBO"] = pyro_step(SVI, trace, images, "trace")
        if K > 1:
            steps["SVI, RenyiELBO"] = pyro_step(SVI, renyi(K), images, "renyi")
        if numpyro_step.is_installed():
            steps["NumPyro"] = numpyro_step.make_step(images.cpu().numpy(), K)
        found = compare(steps, options)
        for name, (milliseconds, ratio) in found.items():
            peak = peak_bytes(steps[name], options.device) / 2**20 if name != "NumPyro" else "-"
            table.rows.append([batch_size, K, name, milliseconds, ratio, peak])
            if (batch_size, K) in QUICK:
                ratios.setdefault(name, []).append(ratio.median)
        if (batch_size, K) in QUICK:
            for row in other_objectives(batch_size, K, images, options):
                others.rows.append(row)
    compiled = geometric_mean(ratios["CompiledSVI"])
    means = {name: compiled / geometric_mean(values) for name, values in ratios.items()}
    table.note = (
        "Time of the compiled step, divided by the time of another step, as a geometric mean over "
        "(batch, K) = (20, 5), (20, 50) and (100, 50): "
        + ", ".join(f"{m:.2f} for {name}" for name, m in means.items() if name != "CompiledSVI")
        + f". The first call compiles and takes {min(first_calls):.1f} to {max(first_calls):.1f} s."
    )
    yield table
    yield others


def other_objectives(
    batch_size: int, K: int, images: Tensor, options: Options
) -> Iterator[list[object]]:
    """Compiled steps of the jackknife and of the doubly reparameterised gradient."""
    objectives = {
        "importance-weighted": ImportanceWeightedELBO(K, max_plate_nesting=1),
        "jackknife, order 1": JackknifeELBO(K, 1, "jackknife", "published", max_plate_nesting=1),
        'importance-weighted, "dreg"': ImportanceWeightedELBO(
            K, gradient="dreg", max_plate_nesting=1
        ),
    }
    steps = {
        name: pyro_step(CompiledSVI, loss, images, f"other{i}")
        for i, (name, loss) in enumerate(objectives.items())
    }
    for name, (milliseconds, ratio) in compare(steps, options).items():
        yield [batch_size, K, name, milliseconds, ratio]
