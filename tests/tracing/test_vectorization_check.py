import random
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import block_autoregressive
from pyro.infer import SVI, autoguide
from torch import nn

from pyro_ext.diagnostics import diagnose, from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.infer import (
    CompiledSVI,
    EvidenceState,
    ImportanceWeightedELBO,
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
)
from pyro_ext.nn import LeadingDims
from tests.models import NormalNormal


def programs_with(net):
    """A latent vector decoded by ``net`` for each of three data points."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=torch.zeros(3, 4))

    def guide():
        with pyro.plate("data", 3, subsample_size=3):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    return model, guide


class Mixing(nn.Module):
    """Standardises over all leading dims, the particle dim included."""

    def forward(self, z):
        return (z - z.mean(tuple(range(z.dim() - 1)))) / z.std(tuple(range(z.dim() - 1)))


def test_accepts_programs_that_keep_particles_apart():
    ImportanceWeightedELBO(4).check(*programs_with(nn.Linear(4, 4)))
    subsampled = NormalNormal(torch.randn(6), subsample_size=2)
    ImportanceWeightedELBO(4).check(subsampled.model, subsampled.guide)


#: name -> a function of draws of shape (..., 3, 4) that mixes those of different particles
MIXING = {
    "mean": lambda z: z - z.mean(0),
    "softmax": lambda z: z.softmax(0),
    "all leading dims": Mixing(),
    "cumulative sum": lambda z: z.cumsum(0),
    "reshape": lambda z: z.transpose(0, -1).reshape(z.shape),
    "first particle": lambda z: z + z.reshape(-1, 4)[0],
    "batch norm": LeadingDims(nn.BatchNorm1d(4), 1),
    "sort": lambda z: z.sort(0).values,
}

#: name -> (a call that takes a model and a guide, the argument that its message recommends)
CALLS = {
    "loss": (lambda m, g: ImportanceWeightedELBO(4).loss(m, g), "vectorize_particles=False"),
    "dreg": (
        lambda m, g: ImportanceWeightedELBO(4, gradient="dreg").loss_and_grads(m, g),
        "vectorize_particles=False",
    ),
    "check": (lambda m, g: ImportanceWeightedELBO(4).check(m, g), "vectorize_particles=False"),
    "SVI": (
        lambda m, g: SVI(m, g, pyro.optim.Adam({}), ImportanceWeightedELBO(4)).step(),
        "vectorize_particles=False",
    ),
    "CompiledSVI": (
        lambda m, g: CompiledSVI(
            m, g, pyro.optim.Adam({}), ImportanceWeightedELBO(4), backend="eager"
        ).step(),
        "vectorize_particles=False",
    ),
    "evidence": (partial(estimate_evidence, num_samples=20), "chunk_size=1"),
    "expectation": (partial(estimate_expectation, num_samples=20), "chunk_size=1"),
    "annealing": (
        partial(annealed_importance_sampling, num_chains=4, num_temperatures=3),
        "use estimate_evidence",
    ),
    "export": (partial(from_pyro_svi, num_samples=20), "chunk_size=1"),
    "diagnosis": (partial(diagnose, num_samples=20), "chunk_size=1"),
}


@pytest.mark.parametrize("net", MIXING.values(), ids=MIXING)
def test_finds_programs_that_mix_particles(net):
    model, guide = programs_with(net)
    for call, remedy in (CALLS["loss"], CALLS["evidence"]):
        with pytest.raises(ValueError, match=f"Site 'x' of the model .*{remedy}"):
            call(model, guide)
    ImportanceWeightedELBO(4, vectorize_particles=False).check(model, guide)
    ImportanceWeightedELBO(1).check(model, guide)


@pytest.mark.parametrize(("call", "remedy"), CALLS.values(), ids=CALLS)
def test_the_first_step_of_every_function_checks(call, remedy):
    with pytest.raises(ValueError, match=f"Site 'x' of the model .*{remedy}"):
        call(*programs_with(Mixing()))
    if call not in (CALLS["check"][0], CALLS["expectation"][0]):
        with pyro.validation_enabled(False):
            call(*programs_with(Mixing()))


def test_mixing_in_the_guide():
    def model():
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("z", dist.Normal(y, 1.0).to_event(1))

    def guide():
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("z", dist.Normal(y - y.mean(0), 1.0).to_event(1))

    with pytest.raises(ValueError, match="Site 'z' of the guide has another"):
        ImportanceWeightedELBO(4).loss(model, guide)


def test_checks_once_for_each_pair():
    calls = []

    def counted(net):
        model, guide = programs_with(net)
        return lambda: (calls.append(net), model()), guide

    first, second = counted(nn.Identity()), counted(nn.Tanh())
    elbo = ImportanceWeightedELBO(4, max_plate_nesting=1)
    numbers = []
    for programs in (first, first, first, second, second):
        calls.clear()
        elbo.loss(*programs)
        numbers.append(len(calls))
    assert numbers == [2, 1, 1, 2, 1]


def test_leaves_random_states_and_buffers_alone():
    found = []
    for is_checked in (True, False):
        norm = nn.BatchNorm1d(4)
        model, guide = programs_with(lambda z, norm=norm: z * norm(torch.randn(8, 4)).detach()[0])
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(is_checked):
            elbo = ImportanceWeightedELBO(4, max_plate_nesting=1)
            found.append([torch.tensor(elbo.loss(model, guide)), norm.running_mean, torch.rand(3)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_programs_that_are_random_for_given_draws_pass_unless_asked():
    model, guide = programs_with(nn.Dropout(0.5))
    elbo = ImportanceWeightedELBO(4)
    elbo.loss_and_grads(model, guide)
    with pytest.raises(ValueError, match=r"'x' of the model.*at each run.*evaluation mode"):
        elbo.check(model, guide)
    elbo.check(*programs_with(nn.Dropout(0.5).eval()))


def ill_conditioned():
    """A model that amplifies rounding, which is another one for several particles."""

    def decode(z):
        rounding = 1 + torch.finfo(z.dtype).eps * (z.dim() > 2)
        return torch.sin(1e5 * z * rounding)

    return programs_with(decode)


def without_an_inverse():
    torch.manual_seed(0)
    flows = [block_autoregressive(4), dist.transforms.Planar(4)]

    def guide():
        with pyro.plate("data", 3):
            base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, flows))

    return programs_with(nn.Linear(4, 4))[0], guide


@pytest.mark.parametrize("build", [ill_conditioned, without_an_inverse])
def test_accepts_what_it_cannot_compare_to_the_last_digit(build):
    model, guide = build()
    for seed in range(5):
        pyro.set_rng_seed(seed)
        ImportanceWeightedELBO(4).check(model, guide)
        ImportanceWeightedELBO(4).loss(model, guide)


def test_leaves_no_trace_in_the_surrounding_handlers():
    model, guide = programs_with(nn.Linear(4, 4))
    with pyro.poutine.trace() as tracer:
        ImportanceWeightedELBO(4, max_plate_nesting=1).check(model, guide)
    assert not tracer.trace.nodes


def test_a_site_that_lost_its_filler_dim_is_refused_by_name():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.squeeze(), 1.0), obs=torch.tensor(2.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(3))

    def guide():
        pyro.sample("mu", dist.Normal(0.4, 0.45))

    elbo = ImportanceWeightedELBO(5)
    message = r"Site 'y' of the model has a log-probability of shape \(5, 5\)"
    for call in (elbo.loss, elbo.check, partial(estimate_evidence, num_samples=5, chunk_size=5)):
        with pytest.raises(ValueError, match=message):
            call(model, guide)


def test_a_messenger_guide_is_refused():
    def model():
        pyro.sample(
            "x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.ones(())
        )

    with pytest.raises(NotImplementedError, match="GuideMessenger"):
        ImportanceWeightedELBO(3).check(model, autoguide.AutoNormalMessenger(model))


def test_a_program_with_two_outcomes_is_random():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z.exp() if random.random() < 0.5 else z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(()))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for seed in range(100):
        pyro.set_rng_seed(seed)
        ImportanceWeightedELBO(3, max_plate_nesting=0).loss(model, guide)


@pytest.mark.parametrize(
    "net",
    [lambda z: z + z[-1], lambda z: z.flip(0).cumsum(0).flip(0), lambda z: z.cumsum(0)],
    ids=["last particle", "reverse sum", "sum"],
)
def test_mixing_that_leaves_one_end_right(net):
    with pytest.raises(ValueError, match="mixes particles"):
        ImportanceWeightedELBO(4).loss(*programs_with(net))


def test_mixing_in_scales():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            with pyro.poutine.scale(scale=z.mean().sigmoid()):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3, 4))

    with pytest.raises(ValueError, match="Site 'x' of the model"):
        ImportanceWeightedELBO(4).loss(model, programs_with(nn.Identity())[1])


def test_handlers_around_a_step():
    def model():
        z = pyro.sample("z", dist.Normal(pyro.param("q", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(()))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.poutine.substitute(data={"q": torch.tensor(3.0)}):
        ImportanceWeightedELBO(3, max_plate_nesting=0).loss(model, guide)


ITEMS = torch.arange(3).repeat(2)


def indexed_model():
    with pyro.plate("items", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Normal(a[ITEMS], 1.0), obs=torch.zeros(6))
    return a.sum(-1)


def indexed_posterior():
    with pyro.plate("items", 3):
        pyro.sample("a", dist.Normal(0.0, 3**-0.5))


def exact_log_evidence():
    covariance = torch.eye(6) + (ITEMS[:, None] == ITEMS)
    return dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(torch.zeros(6)).item()


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
@pytest.mark.parametrize(
    ("function", "read"),
    [
        (estimate_evidence, lambda found: found.total),
        (from_pyro_svi, lambda found: float(group(found, "sample_stats")["log_weight"].mean())),
        (diagnose, lambda found: found.log_evidence),
    ],
)
def test_programs_that_cannot_take_the_dim_run_for_one_draw_at_a_time(function, read):
    """The guide is the posterior, so every weight is the evidence."""
    with pytest.warns(UserWarning, match="run for one draw at a time.*site 'a'") as record:
        found = read(function(indexed_model, indexed_posterior, num_samples=30))
    assert sum("one draw at a time" in str(w.message) for w in record) == 1
    assert found == pytest.approx(exact_log_evidence(), rel=1e-5)
    with pytest.raises(ValueError, match=r"after its site 'a'.*pass chunk_size=1"):
        function(indexed_model, indexed_posterior, num_samples=30, chunk_size=30)


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
def test_expectations_and_later_calls_run_for_one_draw_at_a_time_too():
    with pytest.warns(UserWarning, match="estimate_expectation.*one draw at a time"):
        found = estimate_expectation(indexed_model, indexed_posterior, num_samples=400)
    assert found.value.abs() <= 4.5 * found.std_error
    assert found.std_error == pytest.approx((1 / 400) ** 0.5, rel=0.2)  # the variance is 3 / 3

    state = EvidenceState()
    for num_samples in (4, 8):
        with pytest.warns(UserWarning, match="estimate_evidence.*one draw at a time"):
            evidence = estimate_evidence(
                indexed_model, indexed_posterior, num_samples=num_samples, state=state
            )
        assert evidence.num_samples == num_samples
        assert evidence.total == pytest.approx(exact_log_evidence(), rel=1e-5)
