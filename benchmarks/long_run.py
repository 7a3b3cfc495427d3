"""A long run of ``CompiledSVI``: the share of its time that audits take, and its memory."""

import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from benchmarks.harness import Options, Table
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO


class TimedAudits(CompiledSVI):
    """An SVI that adds up the time of its audited steps."""

    audit_seconds = 0.0
    num_audits = 0

    def _audited_step(self, *args: Any) -> Any:
        start = time.perf_counter()
        loss = super()._audited_step(*args)
        self.audit_seconds += time.perf_counter() - start
        self.num_audits += 1
        return loss


def one_number(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any], torch.Tensor]:
    """The smallest model, where an eager step is slowest next to a compiled one."""

    def model(x: torch.Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", x.new_zeros(())), 1.0))

    return model, guide, torch.ones((), device=device)


def small_vae(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any], torch.Tensor]:
    """The autoencoder of the training step, with 20 images."""
    vae = VAE("vae").to(device)
    return vae.model, vae.guide, random_images(20, device)


def peak_mib() -> float:
    """The peak of the memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def tables(options: Options) -> Iterator[Table]:
    """One row for each model."""
    columns = ["model", "K", "steps", "audits", "ms per step", "audits, % of the time", "MiB grown"]
    table = Table("Long run", columns, chart=(columns[:2], columns[5]))
    num_steps = 3_000 if options.quick else 20_000
    for name, make, K in (("one number", one_number, 1), ("VAE", small_vae, 1)):
        pyro.clear_param_store()
        model, guide, data = make(options.device)
        elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
        svi = TimedAudits(model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo, fallback=False)
        for _ in range(1_000):
            svi.step(data)
        svi.audit_seconds, svi.num_audits, memory = 0.0, 0, peak_mib()
        start = time.perf_counter()
        for _ in range(num_steps):
            svi.step(data)
        seconds = time.perf_counter() - start
        share = 100 * svi.audit_seconds / seconds
        grown = peak_mib() - memory
        milliseconds = 1e3 * seconds / num_steps
        table.rows.append([name, K, num_steps, svi.num_audits, milliseconds, share, grown])
    table.note = "After 1,000 steps, in which audits are more frequent."
    yield table
