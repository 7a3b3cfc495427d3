"""The tables that the tests run over: one line adds an estimator."""

from functools import partial

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO

#: name -> (constructor that takes num_particles, smallest number of particles)
ESTIMATORS = {
    "importance-weighted": (ImportanceWeightedELBO, 1),
    "jackknife-0": (partial(JackknifeELBO, order=0), 1),
    "jackknife-1": (partial(JackknifeELBO, order=1), 2),
    "jackknife-2": (partial(JackknifeELBO, order=2), 3),
}
