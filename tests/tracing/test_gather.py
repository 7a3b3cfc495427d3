"""Terms, masks and scales are inside or outside of the weights."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ext.infer import ImportanceWeightedELBO
from tests.models import NormalNormal
from tests.registry import VECTORIZE
from tests.tracing.traced import X, particles, plate_names


@VECTORIZE
def test_terms_that_no_particle_changes_are_added_outside(vectorize):
    programs = NormalNormal(X, exact_guide=True)

    def model():
        pyro.factor("regularizer", torch.tensor(-3.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))
        programs.model()

    found = particles(model, programs.guide, vectorize=vectorize)
    assert plate_names(found) == ["data"]
    outer = -3.0 + dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)).item()
    assert float(found.outer) == pytest.approx(outer)
    elbo = ImportanceWeightedELBO(3, vectorize_particles=vectorize)
    expected = programs.log_evidence().sum().item() + outer
    assert -elbo.loss(model, programs.guide) == pytest.approx(expected)
    assert -elbo.loss_and_grads(model, programs.guide) == pytest.approx(expected)


def test_observed_terms_of_a_data_point_belong_to_its_weights():
    """A site inside the plate without the particle dim is part of the point's evidence."""
    programs = NormalNormal(X, exact_guide=True)

    def model():
        with programs.plate():
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
            pyro.sample("label", dist.Normal(X.new_zeros(()), 1.0), obs=X)

    found = particles(model, programs.guide)
    label = dist.Normal(X.new_zeros(()), 1.0).log_prob(X)
    torch.testing.assert_close(found.log_w[0], programs.log_evidence() + label)


@VECTORIZE
def test_masks_and_partial_scales_stay_inside_the_weights(vectorize):
    mask = torch.arange(len(X)) < 5
    weight = 0.3

    def model():
        with pyro.plate("data", len(X)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            with poutine.scale(scale=weight):
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        with pyro.plate("data", len(X)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))

    found = particles(model, guide, vectorize=vectorize)
    assert plate_names(found) == ["data"]
    assert found.scale == 1
    assert (found.log_w[:, ~mask] == 0).all()
    for k in range(3):
        trace = found.model_traces[0 if vectorize else k]
        z = trace.nodes["z"]["value"]
        z = z[k] if vectorize else z
        expected = weight * dist.Normal(z, 1.0).log_prob(X)
        torch.testing.assert_close(found.log_w[k][mask], expected[mask])


SCALES = {
    "number": 1 / 8,
    "tensor": torch.tensor(0.125, dtype=torch.float64),
    "one for each point": torch.linspace(0.5, 2.0, 8, dtype=torch.float64),
}


@VECTORIZE
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_one_scale_over_model_and_guide_is_outside_the_bound(scale, vectorize):
    programs = NormalNormal(X)
    elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    plain = elbo.trace_particles(programs.model, programs.guide)
    pyro.set_rng_seed(1)
    model, guide = poutine.scale(programs.model, scale), poutine.scale(programs.guide, scale)
    scaled = elbo.trace_particles(model, guide)
    torch.testing.assert_close(scaled.log_w, plain.log_w)
    pyro.set_rng_seed(1)
    expected = -(scale * elbo.bound(plain.log_w)).sum().item()
    assert elbo.loss(model, guide) == pytest.approx(expected)

    # With subsampling both scales are outside.
    half = NormalNormal(X, subsample_size=4, exact_guide=True)
    if not torch.is_tensor(scale) or scale.dim() == 0:
        model, guide = poutine.scale(half.model, scale), poutine.scale(half.guide, scale)
        found = elbo.trace_particles(model, guide)
        assert float(found.scale) == pytest.approx(float(scale) * 2)
        x = found.model_traces[0].nodes["x"]["value"]
        expected = dist.Normal(x.new_zeros(()), math.sqrt(2)).log_prob(x)
        torch.testing.assert_close(found.log_w, expected.expand_as(found.log_w))


def log_weights_by_hand(found, K, model_scale, guide_scale):
    """Of the model and guide below, from the values in the traces."""
    rows = []
    for k in range(K):
        looped = len(found.model_traces) > 1
        z = found.guide_traces[k if looped else 0].nodes["z"]["value"]
        z = z if looped else z[k]
        log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
        rows.append(model_scale * log_p - guide_scale * dist.Normal(X / 2, 2.3).log_prob(z))
    return torch.stack(rows)


@VECTORIZE
@pytest.mark.parametrize(("model_scale", "guide_scale"), [(0.1, 1.0), (0.1, 0.5), (1.0, 0.5)])
def test_scales_that_differ_between_model_and_guide_stay_inside(
    model_scale, guide_scale, vectorize
):
    def guide():
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(X / 2, 2.3))

    model = NormalNormal(X).model
    if model_scale != 1:
        model = poutine.scale(model, model_scale)
    if guide_scale != 1:
        guide = poutine.scale(guide, guide_scale)
    found = particles(model, guide, K=4, vectorize=vectorize)
    assert found.scale == 1
    expected = log_weights_by_hand(found, 4, model_scale, guide_scale)
    torch.testing.assert_close(found.log_w, expected)


@VECTORIZE
def test_data_of_weight_zero_drop_out(vectorize):
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    programs = NormalNormal(X, exact_guide=True)
    elbo = ImportanceWeightedELBO(3, vectorize_particles=vectorize)
    with pyro.validation_enabled(False):
        model, guide = (poutine.scale(p, weight) for p in (programs.model, programs.guide))
        loss = elbo.loss_and_grads(model, guide)
    assert loss == pytest.approx(-programs.log_evidence()[:6].sum().item())
