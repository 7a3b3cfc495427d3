"""The tables that the tests run over: one line adds an estimator."""

from functools import partial

from pyro_ext.infer import (
    CombinedELBO,
    ImportanceWeightedELBO,
    JackknifeELBO,
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


#: name -> (constructor that takes num_particles, smallest number of particles)
ESTIMATORS = {
    "importance-weighted": (ImportanceWeightedELBO, 1),
    "jackknife-0": (partial(JackknifeELBO, order=0), 1),
    "jackknife-1": (partial(JackknifeELBO, order=1), 2),
    "jackknife-2": (partial(JackknifeELBO, order=2), 3),
    "variational-renyi": (lambda K, **options: VariationalRenyiELBO(0.6, K, **options), 1),
    "combined": (lambda K, **options: CombinedELBO(0.3, K, **options), 1),
    "multiply-importance-weighted": (grouped(MultiplyImportanceWeightedELBO), 1),
    "partially-importance-weighted": (grouped(PartiallyImportanceWeightedELBO), 1),
    "thermodynamic": (partial(ThermodynamicELBO, num_partitions=3), 1),
}
