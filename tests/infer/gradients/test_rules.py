"""Rules that claim to be unbiased have the mean of the pathwise gradient."""

import math
import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ext.infer import ChiUpperELBO, ImportanceWeightedELBO
from tests.infer.gradients.estimates import (
    F64,
    REPLICATES,
    assert_same_mean,
    gradient,
    replicated,
    stored_parameters,
)
from tests.models import NormalNormal, TwoLayer
from tests.registry import EVERY_ESTIMATOR, VECTORIZE, PublishedJackknife
from tests.statistics import assert_mean


@VECTORIZE
@EVERY_ESTIMATOR
def test_two_stochastic_layers_with_a_shared_parameter(make, smallest, vectorize):
    a, w, b, s = parameters = replicated(0.3, 0.8, 0.4, 0.9)
    x = torch.tensor(0.7, **F64)

    def model():
        with pyro.plate("replicates", REPLICATES):
            z2 = pyro.sample("z2", dist.Normal(a, 1.0))
            z1 = pyro.sample("z1", dist.Normal(w * z2, 1.0))
            pyro.sample("x", dist.Normal(w * z1, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES):
            z1 = pyro.sample("z1", dist.Normal(b * x, s))
            pyro.sample("z2", dist.Normal(w * z1 / 2, s))

    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
    pathwise, dreg = (
        gradient(make(max(smallest, 3), gradient=rule, **options), model, guide, parameters, seed=0)
        for rule in ("pathwise", "dreg")
    )
    if isinstance(make(3), ChiUpperELBO):
        pytest.skip("its rules have the same mean for many particles only")
    assert_mean((dreg - pathwise).view(4, -1).T, 0.0)


def test_looped_and_vectorized_rules_agree_for_one_particle():
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64))
    for rule in ("pathwise", "stl", "dreg"):
        elbos = [
            ImportanceWeightedELBO(1, gradient=rule, vectorize_particles=v) for v in (True, False)
        ]
        parameters = stored_parameters(elbos[0], programs.model, programs.guide)
        found = [gradient(e, programs.model, programs.guide, parameters, 0) for e in elbos]
        torch.testing.assert_close(*found)


@pytest.mark.long
@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_one_particle_is_unbiased_under_stl_and_dreg(rule):
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64).repeat(10))
    rules = ("pathwise", rule)
    model, guide = programs.model, programs.guide
    assert_same_mean(ImportanceWeightedELBO, 1, model, guide, rules, 30, max_plate_nesting=1)


@pytest.mark.long
def test_stl_is_biased_for_several_particles():
    """It is documented to be: were it not, the text would be wrong."""
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64).repeat(20))
    elbos = [
        ImportanceWeightedELBO(5, gradient=rule, max_plate_nesting=1)
        for rule in ("pathwise", "stl")
    ]
    parameters = stored_parameters(elbos[0], programs.model, programs.guide)
    draws = [
        torch.stack([gradient(e, programs.model, programs.guide, parameters, s) for s in range(40)])
        for e in elbos
    ]
    difference = draws[1] - draws[0]
    z = difference.mean(0) / (difference.std(0) / 40**0.5)
    assert z.nan_to_num().abs().max() > 6


@pytest.mark.parametrize(("rule", "K"), [("stl", 1), ("dreg", 1), ("dreg", 8)])
def test_no_guide_gradient_at_the_exact_posterior(rule, K):
    x = torch.tensor([0.7, -1.4], **F64)
    slope = torch.tensor(0.5, **F64, requires_grad=True)
    scale = torch.tensor(math.sqrt(0.5), **F64, requires_grad=True)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(slope * x, scale))

    elbo = ImportanceWeightedELBO(K, gradient=rule)
    for seed in range(5):
        found = gradient(elbo, NormalNormal(x).model, guide, [slope, scale], seed)
        assert found.abs().max() < 1e-10
    plain = gradient(ImportanceWeightedELBO(K), NormalNormal(x).model, guide, [slope, scale], 0)
    assert plain.abs().max() > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("make", [ImportanceWeightedELBO, PublishedJackknife])
def test_dreg_is_quieter_near_the_posterior(make):
    x = torch.tensor([0.7, -1.4], **F64)
    slope = torch.tensor(0.48, **F64, requires_grad=True)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(slope * x, 0.75))

    model = NormalNormal(x).model
    deviation = {}
    for rule in ("pathwise", "dreg"):
        elbo = make(20, gradient=rule, max_plate_nesting=1)
        draws = [gradient(elbo, model, guide, [slope], seed) for seed in range(60)]
        deviation[rule] = torch.cat(draws).std()
    assert deviation["dreg"] < deviation["pathwise"] / 4


@pytest.mark.long
@VECTORIZE
def test_subsampled_plate(vectorize):
    x = torch.linspace(-2, 2, 60, **F64)
    slope = torch.tensor(0.2, **F64, requires_grad=True)
    programs = NormalNormal(x, subsample_size=20)

    def guide():
        with programs.plate() as index:
            pyro.sample("z", dist.Normal(slope * x[index], 1.0))

    draws = {}
    for rule in ("pathwise", "dreg"):
        elbo = ImportanceWeightedELBO(
            4, gradient=rule, vectorize_particles=vectorize, max_plate_nesting=1
        )
        found = [gradient(elbo, programs.model, guide, [slope], seed) for seed in range(40)]
        draws[rule] = torch.stack(found)
    assert_mean(draws["dreg"] - draws["pathwise"], 0.0)


def test_masks_and_scales_of_one_guide_site():
    """A draw's log q enters with a factor, and so does the term that DReG replaces."""
    x = torch.tensor(0.5, **F64)
    slope, second = replicated(0.2, 0.1)
    mask = torch.arange(REPLICATES) % 2 == 0

    def model():
        with pyro.plate("replicates", REPLICATES):
            with poutine.mask(mask=mask):
                a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            c = pyro.sample("c", dist.Normal(b, 1.0).mask(mask))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES):
            with poutine.mask(mask=mask):
                a = pyro.sample("a", dist.Normal(slope * x, 0.8))
            with poutine.scale(scale=0.4):
                b = pyro.sample("b", dist.Normal(a + second, 0.9))
            pyro.sample("c", dist.Normal(b + slope, 0.7).mask(mask))

    pathwise, dreg = (
        gradient(
            ImportanceWeightedELBO(3, gradient=rule, max_plate_nesting=1),
            model,
            guide,
            [slope, second],
            seed=0,
        ).view(2, -1)
        for rule in ("pathwise", "dreg")
    )
    for where in (mask, ~mask):
        assert_mean((dreg - pathwise)[:, where].T, 0.0)


def test_a_mask_inside_of_other_distributions_is_refused_by_name():
    loc = torch.zeros(2, requires_grad=True)

    def guide():
        mask = torch.tensor([True, False])
        pyro.sample("z", dist.Normal(loc, 1.0).mask(mask).to_event(1))

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(NotImplementedError, match="'z' has a mask inside another distribution"):
        ImportanceWeightedELBO(2, gradient="dreg").loss_and_grads(model, guide)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_particles_of_weight_zero_leave_the_gradient_finite(rule, size):
    a = torch.tensor(0.3, **F64, requires_grad=True)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
            pyro.factor("cut", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0], **F64))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(a, 1.0))

    elbo = ImportanceWeightedELBO(8, gradient=rule, particle_chunk_size=size, max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(model, guide))
    assert a.grad.isfinite()
    assert a.grad != 0


@pytest.mark.slow
def test_signal_to_noise_falls_for_the_plain_gradient_and_rises_for_dreg():
    path = Path(__file__).parents[3] / "benchmarks" / "signal_to_noise.py"
    benchmark = runpy.run_path(str(path))
    ratios = benchmark["signal_to_noise"]()
    assert benchmark["slope"](ratios["pathwise"]) == pytest.approx(-0.5, abs=0.1)
    assert benchmark["slope"](ratios["dreg"]) == pytest.approx(0.5, abs=0.1)
