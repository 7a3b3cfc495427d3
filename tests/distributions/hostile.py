"""Extreme inputs over the documented range of each distribution."""

import torch

from pyro_ext.distributions import (
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    NormalScaleMixture,
    RGBDiscretizedLogisticMixture,
)

RANGES = [(0, 255), (0, 1), (-128, 127), (0, 65535), (-(2**22), 2**22)]

#: dtype -> the largest exponents of ten of a location, of a scale, and of a logit
EXPONENTS = {
    torch.float16: (4.8, 4.0, 4.0),
    torch.bfloat16: (38.0, 30.0, 30.0),
    torch.float32: (38.0, 30.0, 30.0),
    torch.float64: (300.0, 150.0, 30.0),
}


class Draws:
    """Random tensors of a shape, from one generator."""

    def __init__(self, dtype, generator):
        self.dtype, self.generator = dtype, generator

    def uniform(self, low, high, shape):
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def powers(self, low, high, shape):
        """Powers of ten with exponents between two bounds, of either sign."""
        return 10 ** self.uniform(low, high, shape) * self.uniform(-1, 1, shape).sign()

    def one_of(self, *options):
        """One of several tensors, chosen entry by entry."""
        index = torch.randint(len(options), (1, *options[0].shape), generator=self.generator)
        return torch.stack(options).gather(0, index)[0]

    def logits(self, shape):
        """Log weights, some as good as zero or zero; the first component has some weight."""
        usual, wide = self.uniform(-3, 3, shape), self.powers(-2, 2, shape)
        excluded = -self.powers(2, EXPONENTS[self.dtype][2], shape).abs()
        zero = torch.full(shape, -torch.inf)
        found = self.one_of(usual, usual, usual, wide, wide, excluded, zero.double())
        found[..., 0] = usual[..., 0]
        return found.to(self.dtype)

    def huge_logits(self, shape):
        return self.powers(0, EXPONENTS[self.dtype][2], shape).to(self.dtype)


def pixels(draws, N, C, low, high):
    size = (N, C)
    inside = torch.randint(low, high + 1, size, generator=draws.generator).double()
    return draws.one_of(inside, inside, torch.full(size, low), torch.full(size, high)).double()


def locations(draws, value, low, high, shape):
    """Close to the value, on a border of bins, in the range, and far away."""
    close = value + draws.powers(-6, 3, shape)
    inside = draws.uniform(low, high, shape)
    border = value + 0.5 * draws.uniform(-1, 1, shape).sign()
    largest = EXPONENTS[draws.dtype][0]
    far = draws.powers(-min(largest, 30.0), largest, shape)
    found = draws.one_of(close, close, inside, border.expand(shape), far)
    largest = torch.finfo(draws.dtype).max
    return found.clamp(-largest, largest).to(draws.dtype)


def log_scales(draws, shape):
    end = 80 * draws.uniform(-1, 1, shape).sign()
    wide, usual = draws.uniform(-80, 80, shape), draws.uniform(-6, 6, shape)
    return draws.one_of(wide, wide, usual, usual, end).to(draws.dtype)


def discretized_logistic(draws, N, low, high):
    value = pixels(draws, N, 1, low, high)
    loc = locations(draws, value, low, high, (N, 1))[:, 0]
    given = {"loc": loc, "log_scale": log_scales(draws, (N,))}
    return DiscretizedLogistic, value[:, 0], given


def discretized_logistic_mixture(draws, N, low, high, K=3):
    value = pixels(draws, N, 1, low, high)
    loc = locations(draws, value, low, high, (N, K))
    given = {"logits": draws.logits((N, K)), "loc": loc, "log_scale": log_scales(draws, (N, K))}
    return DiscretizedLogisticMixture, value[:, 0], given


def rgb_discretized_logistic_mixture(draws, N, low, high, K=2):
    value = pixels(draws, N, 3, low, high)
    shape = (N, 3, K)
    loc = locations(draws, value.unsqueeze(-1), low, high, shape)
    largest = min(EXPONENTS[draws.dtype][0] - 8, 30.0)
    far = draws.powers(-5, max(largest, 0.0), shape)
    coeffs = draws.one_of(draws.uniform(-1, 1, shape), draws.uniform(-1, 1, shape), far)
    given = {
        "logits": draws.logits((N, K)),
        "loc": loc,
        "log_scale": log_scales(draws, shape),
        "coeffs": coeffs.to(draws.dtype),
    }
    return RGBDiscretizedLogisticMixture, value, given


def components(draws, N, K=3):
    """Scales with ratios up to the square root of the largest number, and log weights."""
    largest = EXPONENTS[draws.dtype][1]
    widest = 10 ** draws.uniform(-largest, largest, (N, 1))
    smaller = 10 ** -draws.uniform(0, largest, (N, K))
    smallest = float(torch.finfo(draws.dtype).tiny)
    # Not below the normal numbers, which would have too few digits.
    scales = draws.one_of(widest * smaller, widest * smaller, widest.expand(N, K))
    scales = torch.where(scales < smallest, widest, scales).to(draws.dtype)
    return scales, draws.logits((N, K))


def normal_scale_mixture(draws, N):
    scales, logits = components(draws, N)
    near = scales.double() * draws.powers(-5, 5, scales.shape)
    near = near.gather(-1, torch.randint(3, (N, 1), generator=draws.generator))[:, 0]
    far = near.sign() * scales[:, 0].double() * 10 ** draws.uniform(-20, 160, (N,))
    value = draws.one_of(near, far, near * 0)
    # At most the largest number, and a ratio that is a number too.
    largest = torch.finfo(draws.dtype).max / 4
    value = value.clamp(-largest, largest).to(draws.dtype)
    return NormalScaleMixture, value, {"scales": scales, "logits": logits}


DISCRETIZED = {
    "discretized-logistic": discretized_logistic,
    "discretized-logistic-mixture": discretized_logistic_mixture,
    "rgb-discretized-logistic-mixture": rgb_discretized_logistic_mixture,
}
