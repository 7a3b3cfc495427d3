"""Peak memory of a step with K = 2,000 in chunks of 50, over that of a step with K = 50.

    python benchmarks/chunk_memory.py [--device cuda]

Counted beyond parameters and their gradients: on a CPU the live bytes of all tensors that
operations return, on CUDA the allocator's peak.
"""

import argparse
import weakref
from typing import Any

import pyro
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vae import VAE, random_images

from pyro_ext.infer import ImportanceWeightedELBO


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak."""

    def __init__(self, present: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in present}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def release() -> None:
            self.known.discard(key)
            self.live -= size

        weakref.finalize(storage, release)


def peak_bytes(elbo: ImportanceWeightedELBO, device: torch.device) -> int:
    """The peak in a second step, after one that sets everything up."""
    pyro.clear_param_store()
    vae = VAE("vae").to(device)
    images = random_images(20, device)
    elbo.loss_and_grads(vae.model, vae.guide, images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        elbo.loss_and_grads(vae.model, vae.guide, images)
        return torch.cuda.max_memory_allocated() - before
    parameters = list(vae.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    with LiveBytes(parameters + gradients) as counter:
        elbo.loss_and_grads(vae.model, vae.guide, images)
    return counter.peak


def main() -> None:
    """Prints the peaks and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    base = peak_bytes(ImportanceWeightedELBO(50, max_plate_nesting=1), device)
    print(f"K = 50: {base / 2**20:.1f} MiB")
    for rule in ("pathwise", "dreg"):
        for size in (50, None):
            elbo = ImportanceWeightedELBO(
                2000, gradient=rule, particle_chunk_size=size, max_plate_nesting=1
            )
            peak = peak_bytes(elbo, device)
            chunks = "in one" if size is None else f"in chunks of {size}"
            print(f"K = 2000 {chunks}, {rule}: {peak / 2**20:.1f} MiB, ratio {peak / base:.2f}")


if __name__ == "__main__":
    main()
