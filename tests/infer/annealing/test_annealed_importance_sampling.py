import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from pyro_ext.infer import annealed_importance_sampling
from tests.models import GlobalNormal, Interrupted, NormalNormal
from tests.statistics import assert_mean

X = torch.tensor([0.3, -1.9, 2.4, -0.2], dtype=torch.float64)
COUNTS = torch.tensor([[3.0, 4.0, 2.0], [1.0, 4.0, 4.0]]).double()
FEW = {"num_temperatures": 4, "num_leapfrog_steps": 3, "max_plate_nesting": 1}
MANY = {"num_chains": 500, "chunk_size": 500}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*Pareto k")
def test_weights_are_unbiased():
    """Few temperatures, so that the weights vary: a transition that is wrong would show."""
    programs = NormalNormal(X.repeat(100))  # the chains of each copy are independent
    found = annealed_importance_sampling(programs.model, programs.guide, **MANY | FEW)
    error = found.log_evidence - programs.log_evidence()
    assert_mean(error.exp().reshape(100, 4), 1.0)
    # 400 squares with variance 2: 4.5 standard errors are 0.32.
    assert abs((error / found.std_error).square().mean() - 1) < 0.32
    assert (found.ess < 499).all()
    assert ((found.acceptance > 0.5) & (found.acceptance < 1)).all()


def gamma_poisson():
    x = torch.tensor([0.0, 3.0, 9.0]).double().repeat(15)
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def dirichlet_multinomial():
    x = COUNTS.repeat(15, 1)
    with pyro.plate("data", len(x)):
        probs = pyro.sample("probs", dist.Dirichlet(torch.tensor([1.5, 1.0, 2.0]).double()))
        likelihood = dist.Multinomial(probs=probs, total_count=9, validate_args=False)
        pyro.sample("x", likelihood, obs=x)


def uniform_within_uniform():
    """The support of one site depends on another: x | b ~ U(0, b), b | a ~ U(0, a), a ~ U(0, 1)."""
    x = torch.tensor([0.1, 0.6]).double().repeat(15)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Uniform(torch.tensor(0.0).double(), 1.0))
        b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
        pyro.sample("x", dist.Normal(b, 0.2), obs=x)


def uniform_evidence(x):
    # b has density -log b on (0, 1).
    b = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    return ((-b.log()).log() + dist.Normal(b, 0.2).log_prob(x)).logsumexp(0) - math.log(len(b))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*Pareto k")
@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (
            gamma_poisson,
            dist.NegativeBinomial(torch.tensor(2.0).double(), torch.tensor(1 / 1.5)).log_prob(
                torch.tensor([0.0, 3.0, 9.0])
            ),
        ),
        (
            dirichlet_multinomial,
            dist.DirichletMultinomial(
                torch.tensor([1.5, 1.0, 2.0]).double(), total_count=9, validate_args=False
            ).log_prob(COUNTS),
        ),
        (
            uniform_within_uniform,
            torch.stack([uniform_evidence(x) for x in torch.tensor([0.1, 0.6]).double()]),
        ),
    ],
    ids=["positive", "simplex", "dependent support"],
)
def test_constrained_sites(model, exact):
    found = annealed_importance_sampling(model, **MANY | FEW)
    assert_mean((found.log_evidence.reshape(15, -1) - exact).exp(), 1.0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*gap. Chains from the exact sample")
@pytest.mark.parametrize("ladder", ["sigmoid", "geometric", [0, 0.1, 0.3, 0.7, 1]])
def test_chains_in_reverse_are_unbiased_too(ladder):
    x = X.repeat(25)
    programs = NormalNormal(x)
    found = annealed_importance_sampling(
        programs.model,
        programs.guide,
        num_chains=40,
        exact_sample={"z": x / 2 + math.sqrt(0.5) * torch.randn_like(x)},
        **FEW | {"ladder": ladder},
    )
    assert len(found.temperatures) == 5
    assert found.temperatures[0] == 0
    assert found.temperatures[-1] == 1
    assert_mean((programs.log_evidence() - found.upper).exp().reshape(25, 4), 1.0)


def test_a_gap_between_both_directions_is_warned_of():
    """Ten coordinates that the data determine, and one step from the prior to them."""
    x = X.new_full((10,), 2.0)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    with pytest.warns(UserWarning, match="sampling: gap: Chains from the exact sample find more"):
        found = annealed_importance_sampling(
            model,
            num_chains=50,
            exact_sample={"z": x / 1.01 + 0.1 * torch.randn_like(x)},
            **FEW | {"max_plate_nesting": 0},
        )
    assert "gap" in found.flags


@pytest.mark.parametrize("num_chains", [1, 5])
def test_the_exact_guide_has_no_error(num_chains):
    programs = NormalNormal(X, exact_guide=True)
    found = annealed_importance_sampling(
        programs.model, programs.guide, num_chains=num_chains, chunk_size=3, **FEW
    )
    torch.testing.assert_close(found.log_evidence, programs.log_evidence())
    assert found.upper is None
    assert found.num_samples == num_chains
    assert ("std_error" in found.flags) == (num_chains == 1)  # it is unknown then
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        torch.testing.assert_close(twin.acceptance, found.acceptance)


def test_one_temperature_is_importance_sampling():
    programs = NormalNormal(X, exact_guide=True)
    found = annealed_importance_sampling(
        programs.model, programs.guide, num_chains=3, num_temperatures=1, max_plate_nesting=1
    )
    torch.testing.assert_close(found.log_evidence, programs.log_evidence())
    assert found.acceptance.isnan().all()


@pytest.mark.long
def test_a_global_latent_and_terms_outside():
    programs = GlobalNormal(X, exact_guide=False)

    def model():
        pyro.factor("constant", torch.tensor(-2.5))
        programs.model()

    found = annealed_importance_sampling(
        model, programs.guide, num_chains=50, num_temperatures=20, num_leapfrog_steps=4
    )
    assert found.log_evidence.shape == ()
    error = found.log_evidence - (programs.log_evidence() - 2.5)
    assert error.abs() < 5 * found.std_error


@pytest.mark.long
@pytest.mark.parametrize("auto_guide", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides(auto_guide):
    def model():
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0).double(), 0.5))
        z = pyro.sample("z", dist.Normal(scale.new_zeros(()), scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=scale.new_tensor(1.5))

    scale = dist.LogNormal(torch.tensor(0.0).double(), 0.5).icdf(
        (torch.arange(100_000).double() + 0.5) / 100_000
    )
    exact = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(torch.tensor(1.5)).exp().mean().log()
    guide = auto_guide(model, init_scale=0.5)
    guide()
    found = annealed_importance_sampling(
        model, guide, num_chains=100, num_temperatures=30, num_leapfrog_steps=4
    )
    assert (found.log_evidence - exact).abs() < 5 * found.std_error
    assert found.std_error < 0.2


@pytest.mark.long
@pytest.mark.parametrize(
    ("auto_guide", "init_scale"),
    [(AutoNormal, 1.0), (AutoMultivariateNormal, 1.5), (AutoDiagonalNormal, 1.0)],
)
def test_the_transforms_of_automatic_guides_count(auto_guide, init_scale):
    """log s ~ N(0, 1), x ~ N(log s, 1); a Delta of the guide holds the Jacobian of s."""
    x = torch.tensor(0.7, dtype=torch.float64)

    def model():
        s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(s.log(), 1.0), obs=x)

    guide = auto_guide(model, init_scale=init_scale)
    guide()
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    found = annealed_importance_sampling(
        model, guide, num_temperatures=10, num_leapfrog_steps=3, **MANY
    )
    assert (found.log_evidence - exact).abs() < 4.5 * found.std_error
    assert found.std_error < 0.05


@pytest.mark.long
def test_covariances_that_become_singular_reject():
    """A Gaussian process whose length scale and variance wander far."""
    t = torch.linspace(0, 1, 12, dtype=torch.float64)

    def model():
        length, variance, noise = (
            pyro.sample(name, dist.LogNormal(t.new_zeros(()), 2.0)) for name in "lvs"
        )
        distance = (t[:, None] - t).square()
        covariance = variance[..., None, None] * torch.exp(-distance / length[..., None, None] ** 2)
        covariance = covariance + noise[..., None, None] ** 2 * torch.eye(12)
        pyro.sample("x", dist.MultivariateNormal(t.new_zeros(12), covariance), obs=(3 * t).sin())

    found = annealed_importance_sampling(
        model, num_chains=10, num_temperatures=10, num_leapfrog_steps=3, max_plate_nesting=0
    )
    assert found.log_evidence.isfinite()


def test_prints_a_table():
    programs = NormalNormal(X)
    found = annealed_importance_sampling(
        programs.model, programs.guide, num_chains=3, exact_sample={"z": X / 2}, **FEW
    )
    for part in ("AnnealedEvidence(mean of 4 data points, 3 draws)", "upper", "acceptance"):
        assert part in repr(found)
    assert found.to_dataset()["upper"].dims == ("data",)


def test_an_interrupt_keeps_the_chains_that_are_complete():
    programs = NormalNormal(X)
    options = {"num_chains": 20, "chunk_size": 5, **FEW}
    with pytest.warns(UserWarning, match=r"interrupted\. The result uses (5|10) of 20 chains"):
        annealed_importance_sampling(Interrupted(programs.model, 130), programs.guide, **options)
    with pytest.raises(KeyboardInterrupt):
        annealed_importance_sampling(Interrupted(programs.model, 3), programs.guide, **options)
    # A chunk is complete once its chains in reverse are.
    options["exact_sample"] = {"z": X}
    with pytest.warns(UserWarning, match=r"interrupted\. The result uses 5 of 20 chains"):
        found = annealed_importance_sampling(
            Interrupted(programs.model, 145), programs.guide, **options
        )
    assert found.upper.shape == (4,)


def discrete():
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=X.float())


def test_bad_arguments():
    programs = NormalNormal(X)
    pair = (programs.model, programs.guide)
    with pytest.raises(ValueError, match=r"site 'k' \(Bernoulli\) is discrete"):
        annealed_importance_sampling(discrete)
    for options, message in (
        ({"num_chains": 0}, "num_chains must be"),
        ({"num_temperatures": 0}, "num_temperatures must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"ladder": "linear"}, "'sigmoid', 'geometric' or a sequence .* but it is 'linear'"),
        ({"ladder": [0, 0.5, 0.5, 1]}, "ladder must increase from 0 to 1"),
        ({"ladder": [0.1, 1]}, "ladder must increase from 0 to 1"),
        ({"max_plate_nesting": -1}, "max_plate_nesting must be at least 0"),
        ({"target_acceptance": 1.0}, "target_acceptance must be between 0.05 and 0.99"),
        ({"exact_sample": {"y": X}}, r"latent sites of the guide, \['z'\], but it has \['y'\]"),
        (
            {"jackknife_orders": (3,), "num_chains": 3},
            "jackknife_orders must be below the number of draws, 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_importance_sampling(*pair, **FEW | options)
    for options, message in (
        ({"num_leapfrog_steps": 1.5}, "num_leapfrog_steps must be an integer"),
        ({"ladder": [0, "a", 1]}, "ladder must hold numbers"),
        ({"check_prior": "no"}, "check_prior must be True or False"),
    ):
        with pytest.raises(TypeError, match=message):
            annealed_importance_sampling(*pair, **options)

    def points():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Delta(X / 2))

    with pytest.raises(ValueError, match="the guide draws no latent site"):
        annealed_importance_sampling(programs.model, points, **FEW)


def test_sites_that_annealing_cannot_move():
    def model(kind):
        with pyro.plate("data", 4):
            if kind == "circular":
                pyro.sample("a", dist.VonMises(X.new_zeros(()), X.new_ones(())))
            if kind == "masked":
                pyro.sample("w", dist.Normal(X.new_zeros(()), 1.0).mask(False))
            with poutine.scale(scale=0.1 if kind == "scaled" else 1.0):
                z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    for kind, message in (
        ("circular", r"site 'a' \(VonMises\) .* no map to unconstrained space"),
        ("masked", "site 'w' is masked out"),
        ("scaled", r"has a scale of its own.* poutine\.scale, or put one scale around all"),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_importance_sampling(model, None, kind, **FEW)
    with poutine.scale(scale=0.1):  # the same around all is no matter
        found = annealed_importance_sampling(model, None, None, **FEW | {"num_chains": 50})
    error = found.log_evidence - NormalNormal(X).log_evidence()
    assert (error.abs() < 5 * found.std_error).all()


def test_a_guide_at_one_point_is_warned_of():
    def model():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(X.new_zeros(()), 1.0))
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("a", dist.Delta(X / 3))
            pyro.sample("z", dist.Normal(X / 2, 1.0))

    with pytest.warns(UserWarning, match="puts site 'a' at one point"):
        annealed_importance_sampling(model, guide, **FEW)


def test_bad_weights_name_the_data_points():
    programs = NormalNormal(X)
    for bad, message in (
        (math.nan, r"log weight for data points \[2\] \(of 4\) is nan\..* site 'f'"),
        (-math.inf, r"weights are zero for data points \[2\] \(of 4\)"),
    ):

        def model(bad=bad):
            with pyro.plate("data", len(X)):
                z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
                pyro.factor("f", torch.tensor([0.0, 0.0, bad, 0.0]) + 0 * z)

        with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
            annealed_importance_sampling(model, programs.guide, **FEW)
