"""The network of Burda et al. (2016): 784-200-200-50, tanh, Bernoulli pixels."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """A model and guide pair over binary images, with parameters under a name of its own."""

    def __init__(
        self, name: str, num_pixels: int = 784, hidden: int = 200, latent: int = 50
    ) -> None:
        super().__init__()
        self.name = name
        self.latent = latent
        self.encoder = mlp(num_pixels, hidden, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, hidden, num_pixels)

    def plate(self, x: Tensor) -> pyro.plate:
        """The plate of the images."""
        return pyro.plate("data", len(x))

    def model(self, x: Tensor) -> None:
        """p(x, z), z standard normal."""
        pyro.module(self.name, self)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), normal with diagonal covariance."""
        with self.plate(x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def random_images(batch_size: int, device: torch.device, num_pixels: int = 784) -> Tensor:
    """Binary images of the right shape; the time of a step does not depend on what they show."""
    return (torch.rand(batch_size, num_pixels, device=device) < 0.2).float()
