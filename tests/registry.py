"""The tables that the tests run over: one line adds an estimator or a distribution."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from pyro_ext.distributions import (
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    NormalScaleMixture,
    RGBDiscretizedLogisticMixture,
)
from pyro_ext.infer import (
    ChiUpperELBO,
    CombinedELBO,
    ImportanceWeightedELBO,
    JackknifeELBO,
    MultilevelELBO,
    MultiplyImportanceWeightedELBO,
    PartiallyImportanceWeightedELBO,
    ThermodynamicELBO,
    VariationalRenyiELBO,
)


def grouped(cls):
    """With two groups where the number of particles is even."""
    return lambda num_particles, **options: cls(
        num_particles, num_groups=2 - num_particles % 2, **options
    )


class TopLevelELBO(MultilevelELBO):
    """At its largest level in every evaluation, so that the number of particles is constant."""

    def __init__(self, num_particles, **options):
        level = (num_particles & -num_particles).bit_length() - 1
        super().__init__(num_particles >> level, max_level=level, **options)
        self.num_particles = num_particles

    def held_level(self):
        return nullcontext()


def chi_upper(num_particles, **options):
    """With the default rule of the others. It refuses two options, which skips a test of them."""
    if options.get("gradient") == "stl" or "local_plate" in options:
        pytest.skip("refused")
    return ChiUpperELBO(num_particles, **{"gradient": "pathwise", **options})


#: Trains model and guide on the jackknife itself.
PublishedJackknife = partial(JackknifeELBO, guide="jackknife", weights="published")


#: name -> (constructor that takes num_particles, smallest number of particles)
ESTIMATORS = {
    "importance-weighted": (ImportanceWeightedELBO, 1),
    "jackknife-0": (partial(JackknifeELBO, order=0), 1),
    "jackknife-1": (partial(JackknifeELBO, order=1), 2),
    "jackknife-2": (partial(JackknifeELBO, order=2), 3),
    "jackknife-2, nonnegative": (
        partial(JackknifeELBO, order=2, weights="nonnegative"),
        3,
    ),
    "jackknife-1, published": (partial(PublishedJackknife, order=1), 2),
    "jackknife-2, published": (partial(PublishedJackknife, order=2), 3),
    "multilevel": (TopLevelELBO, 1),
    "variational-renyi": (lambda K, **options: VariationalRenyiELBO(0.6, K, **options), 1),
    "combined": (lambda K, **options: CombinedELBO(0.3, K, **options), 1),
    "multiply-importance-weighted": (grouped(MultiplyImportanceWeightedELBO), 1),
    "partially-importance-weighted": (grouped(PartiallyImportanceWeightedELBO), 1),
    "chi-upper": (chi_upper, 1),
    "thermodynamic": (partial(ThermodynamicELBO, num_partitions=3), 1),
}

EVERY_ESTIMATOR = pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
VECTORIZE = pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])


def uniform(low, high, shape, **options):
    """Fixed numbers between two bounds, spread differently along every dim."""
    count = torch.arange(1, 1 + math.prod(shape), **options)
    return low + (high - low) * (count * 0.6180339887).frac().reshape(shape)


def scale_mixture_parameters(shape, **options):
    return {
        "scales": uniform(0.2, 3.0, (*shape, 3), **options),
        "logits": uniform(-1.0, 1.0, (*shape, 3), **options),
    }


def logistic_parameters(shape, **options):
    return {
        "loc": uniform(-3.0, 5.0, shape, **options),
        "log_scale": uniform(-1.5, 1.5, shape, **options),
    }


def logistic_mixture_parameters(shape, **options):
    return {
        "logits": uniform(-1.0, 1.0, (*shape, 4), **options),
        **logistic_parameters((*shape, 4), **options),
    }


def rgb_parameters(shape, **options):
    return {
        "logits": uniform(-1.0, 1.0, (*shape, 2), **options),
        **logistic_parameters((*shape, 3, 2), **options),
        "coeffs": uniform(-0.9, 0.9, (*shape, 3, 2), **options),
    }


#: name -> (class, parameters of a batch shape, other arguments)
DISTRIBUTIONS = {
    "normal-scale-mixture": (NormalScaleMixture, scale_mixture_parameters, {}),
    "discretized-logistic": (DiscretizedLogistic, logistic_parameters, {"low": -4, "high": 7}),
    "discretized-logistic-mixture": (
        DiscretizedLogisticMixture,
        logistic_mixture_parameters,
        {"low": -4, "high": 7},
    ),
    "rgb-discretized-logistic-mixture": (
        RGBDiscretizedLogisticMixture,
        rgb_parameters,
        {"low": -1, "high": 3},
    ),
}
