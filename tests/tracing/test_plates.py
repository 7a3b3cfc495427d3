"""Common plates keep weights of their own, and others are refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_ext.infer import ImportanceWeightedELBO
from tests.models import GlobalNormal, NormalNormal
from tests.registry import VECTORIZE
from tests.tracing.traced import X, particles, plate_names


@VECTORIZE
def test_common_plates_come_left_to_right_without_filler_dims(vectorize):
    def plates():
        return pyro.plate("rows", 4, dim=-3), pyro.plate("columns", 5, dim=-1)

    def guide():
        rows, columns = plates()
        with rows, columns:
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def model():
        rows, columns = plates()
        with rows, columns:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("pixels", 7, dim=-2):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(4, 7, 5))

    found = particles(model, guide, vectorize=vectorize)
    assert plate_names(found) == ["rows", "columns"]
    assert found.log_w.shape == (3, 4, 5)
    log_prob = found.model_traces[0].nodes["x"]["log_prob"]
    expected = log_prob.sum(-2)[0] if vectorize else log_prob.sum(-2)
    torch.testing.assert_close(found.log_w[0], expected)


@VECTORIZE
def test_deterministic_and_subsample_sites_do_not_break_a_plate(vectorize):
    programs = NormalNormal(X)

    def model():
        pyro.deterministic("two", torch.tensor(2.0))
        programs.model()
        with poutine.mask(mask=False):
            pyro.sample("unused", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    assert plate_names(particles(model, programs.guide, vectorize=vectorize)) == ["data"]


@VECTORIZE
def test_a_factor_that_depends_on_the_latents_breaks_the_plate(vectorize):
    programs = NormalNormal(X)

    def model():
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        pyro.factor("coupling", -z.square().mean(-1, keepdim=vectorize))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the joint weight, which another test expects
        found = particles(model, programs.guide, vectorize=vectorize)
    assert plate_names(found) == []
    assert found.log_w.shape == (3,)


@VECTORIZE
def test_nested_plates_sum_into_the_common_one(vectorize):
    def guide():
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        with pyro.plate("groups", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 4, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3, 4))

    found = particles(model, guide, vectorize=vectorize)
    assert plate_names(found) == ["groups"]
    assert found.log_w.shape == (3, 3)


@VECTORIZE
def test_sequential_plates_share_one_weight(vectorize):
    def guide():
        for i in pyro.plate("steps", 3):
            pyro.sample(f"z{i}", dist.Normal(X[i] / 2, math.sqrt(0.5)))

    def model():
        for i in pyro.plate("steps", 3):
            z = pyro.sample(f"z{i}", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=X[i])

    elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
    with pytest.warns(UserWarning, match="'steps' holds all the data but is sequential"):
        loss = elbo.loss(model, guide)
    expected = NormalNormal(X[:3]).log_evidence().sum().item()
    assert loss == pytest.approx(-expected)


def test_a_global_latent_gives_one_joint_weight_and_one_warning():
    programs = GlobalNormal(X)
    elbo = ImportanceWeightedELBO(4)
    with pytest.warns(UserWarning, match="'data' holds all the data but does not enclose the si"):
        loss = elbo.loss(programs.model, programs.guide)
    assert loss == pytest.approx(-programs.log_evidence().item())
    elbo.loss(programs.model, programs.guide)  # a second warning would be an error here


@VECTORIZE
def test_a_subsampled_plate_that_is_not_common_is_refused(vectorize):
    programs = GlobalNormal(X, subsample_size=2)
    elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
    message = r"Plate 'data' is subsampled \(2 of 8\) but does not enclose the site 'z' of the mod"
    with pytest.raises(ValueError, match=message):
        elbo.loss(programs.model, programs.guide)

    def sequential():
        for i in pyro.plate("steps", 8, subsample_size=2):
            z = pyro.sample(f"z{i}", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=X[i])

    def sequential_guide():
        for i in pyro.plate("steps", 8, subsample_size=2):
            pyro.sample(f"z{i}", dist.Normal(X.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"'steps' is subsampled \(2 of 8\) but is sequential"):
        elbo.loss(sequential, sequential_guide)


def test_one_particle_accepts_a_subsampled_plate_that_is_not_common():
    programs = GlobalNormal(X, subsample_size=2, exact_guide=False)
    ours, theirs = ImportanceWeightedELBO(1), Trace_ELBO()
    for elbo in (ours, theirs):
        pyro.set_rng_seed(5)
        elbo.value = elbo.loss(programs.model, programs.guide)
    assert ours.value == pytest.approx(theirs.value)
