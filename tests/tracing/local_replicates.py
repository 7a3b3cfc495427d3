"""Data and replicates of programs with a local plate, and their gradients."""

import pyro
import pyro.distributions as dist
import torch

F64 = {"dtype": torch.float64}
X = torch.tensor([0.3, -1.9, 2.4, -0.2, 3.1], **F64)
REPLICATES = 4000


def gradient(elbo, model, guide, parameters, seed=0):
    """The gradient of the bound, one row a parameter; replicates have parameters of their own."""
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(model, guide)
    return -torch.stack(torch.autograd.grad(loss, parameters))


def replicated(*values):
    return [torch.full((REPLICATES, 1), v, **F64).requires_grad_() for v in values]


def hierarchical_replicates(parameters, subsample_size=None):
    """theta2 | theta1, z2 | z1, theta: each guide site depends on all of the earlier ones."""
    a, b, c, s = parameters
    x = torch.tensor([0.7, -1.2, 0.4], **F64)
    replicates = pyro.plate("replicates", REPLICATES, dim=-2)
    zero = x.new_zeros(())

    def data():
        return pyro.plate("data", len(x), subsample_size=subsample_size, dim=-1)

    def model():
        with replicates:
            theta1 = pyro.sample("theta1", dist.Normal(zero, 1.0))
            theta2 = pyro.sample("theta2", dist.Normal(theta1, 1.0))
            with data() as index:
                z1 = pyro.sample("z1", dist.Normal(theta2 + c, 1.0))
                z2 = pyro.sample("z2", dist.Normal(z1 * theta1, 1.0))
                pyro.sample("x", dist.Normal(z2, 0.7), obs=x[index])

    def guide():
        with replicates:
            theta1 = pyro.sample("theta1", dist.Normal(a, s))
            theta2 = pyro.sample("theta2", dist.Normal(b * theta1, s))
            with data() as index:
                z1 = pyro.sample("z1", dist.Normal(a * x[index] + b * theta2 * theta1, s))
                pyro.sample("z2", dist.Normal(b * z1 + c * theta1, s + theta2**2))

    return model, guide
