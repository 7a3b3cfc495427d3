"""Data, the particles of a model and guide, and the names of their plates."""

import torch

from pyro_ext.infer import ImportanceWeightedELBO

X = torch.tensor([0.3, -1.9, 2.4, -0.2, 3.1, 0.8, -2.7, 1.1], dtype=torch.float64)


def particles(model, guide, K=3, vectorize=True, **options):
    elbo = ImportanceWeightedELBO(K, vectorize_particles=vectorize, **options)
    return elbo.trace_particles(model, guide)


def plate_names(found):
    return [frame.name for frame in found.plates]
