"""Every dependence of a site on the particle is seen."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence
from tests.models import NormalNormal
from tests.registry import VECTORIZE
from tests.tracing.traced import X, particles, plate_names


@VECTORIZE
def test_factors_of_one_name_in_both_programs_are_told_apart(vectorize):
    def model():
        pyro.factor("f", X.new_tensor(0.5))
        NormalNormal(X).model()

    def guide():
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.2))
        pyro.factor("f", 0.1 * z.sum(-1, keepdim=vectorize), has_rsample=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = particles(model, guide, vectorize=vectorize)
    assert plate_names(found) == []
    assert found.outer == 0


LOST = {
    "buffer": lambda z: torch.zeros(2, dtype=z.dtype).index_copy_(
        0, torch.tensor([0]), z.detach().as_subclass(torch.Tensor).reshape(1)
    )[0],
    "item": lambda z: X.new_tensor(z.item()),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_looped_dependence_is_seen_where_provenance_is_lost(lose):
    def model():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", len(X), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(lose(z), 1.0), obs=X[index])

    def guide():
        pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))

    elbo = ImportanceWeightedELBO(4, vectorize_particles=False)
    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 8\)"):
        elbo.loss(model, guide)
    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 8\)"):
        estimate_evidence(model, guide, num_samples=3, chunk_size=1)


def test_looped_dependence_follows_the_arguments():
    def model(coupled):
        pyro.factor("constant", X.new_tensor(-1.0))
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        if coupled:
            pyro.factor("coupling", -z.mean().square())

    def guide(coupled):
        NormalNormal(X).guide()

    elbo = ImportanceWeightedELBO(3, vectorize_particles=False)
    assert plate_names(elbo.trace_particles(model, guide, (False,))) == ["data"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert plate_names(elbo.trace_particles(model, guide, (True,))) == []


@VECTORIZE
def test_dependence_through_a_transform_that_hides_its_batch_shape(vectorize):
    def model():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        loc = z.unsqueeze(-1) * X.new_ones(2)
        base = dist.Normal(X.new_zeros(2), 1.0).to_event(1)
        shift = dist.transforms.LowerCholeskyAffine(loc, torch.eye(2, dtype=X.dtype))
        with pyro.plate("data", 4, subsample_size=2):
            fn = dist.TransformedDistribution(base, [shift])
            pyro.sample("x", fn, obs=X.new_zeros(2, 2))

    def guide():
        pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))

    elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\)"):
        elbo.loss(model, guide)
