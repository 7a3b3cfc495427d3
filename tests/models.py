"""Model and guide pairs whose evidence and posterior are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch


class NormalNormal:
    """z ~ N(0, 1), x | z ~ N(z, 1) for each of N data points, in one plate.

    The evidence of a point is N(0, 2), its posterior N(x / 2, 1/2).
    """

    def __init__(self, x, subsample_size=None, exact_guide=False):
        self.x = x
        self.subsample_size = subsample_size
        self.exact_guide = exact_guide

    def plate(self):
        return pyro.plate("data", len(self.x), subsample_size=self.subsample_size)

    def model(self):
        zero = self.x.new_zeros(())
        with self.plate() as index:
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[index])

    def guide(self):
        with self.plate() as index:
            if self.exact_guide:
                pyro.sample("z", dist.Normal(self.x[index] / 2, math.sqrt(0.5)))
            else:
                pyro.sample("z", dist.Normal(self.x.new_zeros(()), 1.2))

    def log_evidence(self):
        return dist.Normal(self.x.new_zeros(()), math.sqrt(2)).log_prob(self.x)


class GlobalNormal:
    """z ~ N(0, 1) once, x_n | z ~ N(z, 1) for N data points in a plate."""

    def __init__(self, x, subsample_size=None, exact_guide=True):
        self.x = x
        self.subsample_size = subsample_size
        self.exact_guide = exact_guide

    def model(self):
        z = pyro.sample("z", dist.Normal(self.x.new_zeros(()), 1.0))
        with pyro.plate("data", len(self.x), subsample_size=self.subsample_size) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[index])

    def guide(self):
        N = len(self.x)
        if self.exact_guide:
            pyro.sample("z", dist.Normal(self.x.sum() / (N + 1), 1 / math.sqrt(N + 1)))
        else:
            pyro.sample("z", dist.Normal(self.x.new_zeros(()), 1.0))

    def log_evidence(self):
        N = len(self.x)
        eye = torch.eye(N, dtype=self.x.dtype, device=self.x.device)
        covariance = eye + 1
        return dist.MultivariateNormal(self.x.new_zeros(N), covariance).log_prob(self.x)


class TwoLayer:
    """z2 ~ N(a, 1), z1 | z2 ~ N(w z2, 1), x | z1 ~ N(w z1, 1), one plate, and a guide in z1, z2.

    The parameter w is in the prior of z1, in the likelihood and in the guide.
    """

    def __init__(self, x):
        self.x = x

    def model(self):
        a = pyro.param("a", self.x.new_tensor(0.3))
        w = pyro.param("w", self.x.new_tensor(0.8))
        with pyro.plate("data", len(self.x)):
            z2 = pyro.sample("z2", dist.Normal(a, 1.0))
            z1 = pyro.sample("z1", dist.Normal(w * z2, 1.0))
            pyro.sample("x", dist.Normal(w * z1, 1.0), obs=self.x)

    def guide(self):
        w = pyro.param("w", self.x.new_tensor(0.8))
        b = pyro.param("b", self.x.new_tensor(0.4))
        scale = pyro.param("scale", self.x.new_tensor(0.9), constraint=dist.constraints.positive)
        with pyro.plate("data", len(self.x)):
            z1 = pyro.sample("z1", dist.Normal(b * self.x, scale))
            pyro.sample("z2", dist.Normal(w * z1 / 2, scale))


class Hierarchical(NormalNormal):
    """theta ~ N(0, 1), z_n | theta ~ N(theta, 1), x_n | z_n ~ N(z_n, 1), z and x in one plate."""

    def model(self):
        theta = pyro.sample("theta", dist.Normal(self.x.new_zeros(()), 1.0))
        with self.plate() as index:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[index])

    def guide(self):
        N = len(self.x)
        if self.exact_guide:
            initial = (self.x.sum().item() / (N + 2), math.sqrt(2 / (N + 2)), 0.5, math.sqrt(0.5))
        else:
            initial = (0.1, 0.6, 0.4, 1.3)
        loc, scale, slope, local_scale = (
            pyro.param(name, self.x.new_tensor(value))
            for name, value in zip(("loc", "scale", "slope", "local"), initial, strict=True)
        )
        theta = pyro.sample("theta", dist.Normal(loc, scale))
        with self.plate() as index:
            pyro.sample("z", dist.Normal(slope * (theta + self.x[index]), local_scale))

    def log_evidence(self):
        N = len(self.x)
        covariance = 2 * torch.eye(N, dtype=self.x.dtype, device=self.x.device) + 1
        return dist.MultivariateNormal(self.x.new_zeros(N), covariance).log_prob(self.x)


class Interrupted:
    """A program that is interrupted at a call.

    :param program: the program.
    :param calls: how many calls go through.
    """

    def __init__(self, program, calls):
        self.program = program
        self.calls = calls

    def __call__(self, *args):
        self.calls -= 1
        if self.calls == -1:
            raise KeyboardInterrupt
        self.program(*args)
