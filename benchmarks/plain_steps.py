"""The training step of the importance-weighted VAE, written in plain PyTorch by hand."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.harness import Step
from benchmarks.vae import VAE


class Loss(nn.Module):
    """The negative importance-weighted bound."""

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.vae = VAE("plain")
        self.num_particles = num_particles

    def forward(self, images: Tensor) -> Tensor:
        """The sum over the images."""
        constant = math.log(2 * math.pi) / 2
        loc, log_scale = self.vae.encoder(images).chunk(2, -1)
        noise = torch.randn(self.num_particles, *loc.shape, device=images.device)
        z = loc + log_scale.exp() * noise
        logits = self.vae.decoder(z)
        log_likelihood = -binary_cross_entropy_with_logits(
            logits, images.expand_as(logits), reduction="none"
        ).sum(-1)
        log_prior = (-z.square() / 2 - constant).sum(-1)
        log_q = (-noise.square() / 2 - log_scale - constant).sum(-1)
        log_w = log_likelihood + log_prior - log_q
        return -(log_w.logsumexp(0) - math.log(self.num_particles)).sum()


def plain_step(images: Tensor, num_particles: int, is_compiled: bool = False) -> Step:
    """The step as one writes it, with fused Adam; ``torch.compile`` takes loss and gradients."""
    loss_of = Loss(num_particles).to(images.device)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=1e-3, fused=True)
    if is_compiled:
        torch.compiler.reset()  # it compiles a function for only a few sizes
        loss_of.compile(dynamic=False)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(images)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def matmuls(images: Tensor, num_particles: int) -> Step:
    """The matrix products of the step: all layers forward, then backward but to the images.

    Inputs and results have their memory from the start, and each product its own.
    """
    vae = VAE("matmuls").to(images.device).requires_grad_(False)
    forward, backward = [], []
    for network, num_rows in (
        (vae.encoder, len(images)),
        (vae.decoder, num_particles * len(images)),
    ):
        for layer in (module for module in network if isinstance(module, nn.Linear)):
            is_first = layer is vae.encoder[0]
            x = images if is_first else images.new_empty(num_rows, layer.in_features).normal_()
            out = images.new_empty(num_rows, layer.out_features)
            slope = torch.randn_like(out)
            forward.append((layer.bias, x, layer.weight.T, out))
            backward.append((slope.T, x, torch.empty_like(layer.weight)))
            if not is_first:
                backward.append((slope, layer.weight, torch.empty_like(x)))
    backward.reverse()

    def step() -> None:
        for bias, x, weight, out in forward:
            torch.addmm(bias, x, weight, out=out)
        for x, y, out in backward:
            torch.mm(x, y, out=out)

    return step
