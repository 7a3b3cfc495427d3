"""Which plates keep their own weights, and that scales stay outside of the bound."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence
from pyro_ext.tracing import ParticleTracer, Programs
from tests.models import GlobalNormal, NormalNormal
from tests.registry import ESTIMATORS
from tests.statistics import assert_mean, assert_mean_at_most

X = torch.tensor([0.3, -1.9, 2.4, -0.2, 3.1, 0.8, -2.7, 1.1], dtype=torch.float64)
VECTORIZE = pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])


def particles(model, guide, K=3, vectorize=True, **options):
    elbo = ImportanceWeightedELBO(K, vectorize_particles=vectorize, **options)
    return elbo.trace_particles(model, guide)


def plate_names(found):
    return [frame.name for frame in found.plates]


@pytest.mark.parametrize("K", [1, 4, 16])
def test_bound_is_the_same_full_and_subsampled_vectorized_and_looped(K):
    exact = NormalNormal(X).log_evidence().sum()
    means = {}
    for subsample_size in (None, 1, 3):
        for vectorize in (True, False):
            programs = NormalNormal(X, subsample_size)
            elbo = ImportanceWeightedELBO(K, vectorize_particles=vectorize, max_plate_nesting=1)
            num_draws = 400 if vectorize else 100
            draws = [-elbo.loss(programs.model, programs.guide) for _ in range(num_draws)]
            draws = torch.tensor(draws, dtype=torch.float64)
            assert_mean_at_most(draws, exact)
            means[subsample_size, vectorize] = draws.mean(), draws.var() / len(draws)
    for mean, variance in means.values():
        for other_mean, other_variance in means.values():
            assert (mean - other_mean).abs() < 4.5 * (variance + other_variance).sqrt()


def test_renyi_elbo_of_pyro_breaks_the_bound_that_ours_keeps():
    exact = NormalNormal(X).log_evidence().sum()
    programs = NormalNormal(X, subsample_size=1)
    theirs = RenyiELBO(alpha=0, num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.tensor([-theirs.loss(programs.model, programs.guide) for _ in range(400)])
    assert draws.mean() - exact > 4.5 * draws.std() / 20


@VECTORIZE
@pytest.mark.parametrize("subsample_size", [None, 3])
@pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_exact_posterior_gives_the_exact_evidence(make, smallest, subsample_size, vectorize):
    programs = NormalNormal(X, subsample_size, exact_guide=True)
    elbo = make(smallest + 2, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    found = elbo.trace_particles(programs.model, programs.guide)
    minibatch = found.model_traces[0].nodes["x"]["value"]
    evidence = dist.Normal(X.new_zeros(()), math.sqrt(2)).log_prob(minibatch)
    torch.testing.assert_close(found.log_w, evidence.expand_as(found.log_w))
    pyro.set_rng_seed(3)
    loss = elbo.loss(programs.model, programs.guide)
    assert loss == pytest.approx(-len(X) / len(minibatch) * evidence.sum().item(), abs=1e-6)


def test_looped_particles_share_the_minibatch():
    found = particles(NormalNormal(X, 2).model, NormalNormal(X, 2).guide, 5, vectorize=False)
    first = found.model_traces[0].nodes["x"]["value"]
    for trace in found.model_traces:
        assert (trace.nodes["x"]["value"] == first).all()

    data_only = GlobalNormal(X, 2)  # the plate is in the model alone
    tracer = ParticleTracer(5, vectorize=False)
    traces = tracer.run(Programs(data_only.model, data_only.guide))
    first = traces.model_traces[0].nodes["x"]["value"]
    for trace in traces.model_traces:
        assert (trace.nodes["x"]["value"] == first).all()


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


def test_subsampled_bound_is_unbiased_for_the_full_one():
    """Every minibatch of one point, weighted by N / B, averages to the full evidence."""
    programs = NormalNormal(X, subsample_size=1, exact_guide=True)
    elbo = ImportanceWeightedELBO(4, max_plate_nesting=1)
    draws = [-elbo.loss(programs.model, programs.guide) for _ in range(400)]
    assert_mean(torch.tensor(draws), programs.log_evidence().sum())


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


@pytest.mark.parametrize("mask", [True, False, torch.ones(len(X), dtype=torch.bool)], ids=str)
def test_masks_that_change_nothing_for_the_guide_are_not_warned_of(mask):
    def model():
        with pyro.plate("data", len(X)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))

    ImportanceWeightedELBO(3).loss(model, NormalNormal(X).guide)


def test_a_latent_masked_in_the_model_alone_is_warned_of():
    mask = torch.arange(len(X)) < 4

    def model():
        with pyro.plate("data", len(X)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    with pytest.warns(UserWarning, match="Site 'z' is masked in the model but not in the guide"):
        ImportanceWeightedELBO(3).loss(model, NormalNormal(X).guide)
