import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import annealed_importance_sampling, sequential_monte_carlo
from tests.infer.annealing.test_cloud import cloud_of
from tests.infer.annealing.test_sequential_monte_carlo import (
    FEW,
    TWO_MODES,
    local_normal,
    one_mode,
    two_modes,
)
from tests.models import Interrupted
from tests.statistics import assert_mean


def test_a_particle_is_kept_by_a_copy_that_is_one_of_all():
    log_w = torch.tensor([0.5, 0.05, 0.25, 0.2]).double().log()
    cloud = cloud_of(log_w.repeat(3000), 3000).reweighted(torch.tensor(1.0).double())
    expected = {0: [2, 2, 0, 0], 1: [0, 0, 1, 0], 2: [0, 0, 0.8, 0.2], 3: [0, 0, 0, 1]}
    for particle, of_copies in expected.items():
        index = torch.full((3000,), particle)
        offset, copy = cloud.keeping(4, index)
        positions = cloud.resampled(4, offset).state.positions.reshape(3000, 4)
        kept = positions.gather(1, copy.unsqueeze(1)).squeeze(1) % 4
        assert (kept == particle).all()
        found = torch.nn.functional.one_hot(copy, 4).double().mean(0)
        weights = torch.tensor(of_copies).double()
        # The standard error of a frequency of 3,000 is at most 0.0092.
        assert (found - weights / weights.sum()).abs().max() < 0.041


@pytest.mark.filterwarnings("ignore:sequential_monte_carlo")
@pytest.mark.parametrize("target_ess", [0.3, 0.8])
def test_evidence_through_an_exact_sample_is_unbiased_from_above(target_ess):
    z = torch.randn(400).double()
    x = z + 0.3 * torch.randn(400)
    evidence = sequential_monte_carlo(
        local_normal,
        None,
        x,
        num_particles=16,
        chain_length=4,
        num_runs=4,
        target_ess=target_ess,
        exact_sample={"z": z},
    ).evidence
    exact = dist.Normal(0.0, 1.09**0.5).log_prob(x)
    assert_mean((exact - evidence.upper).exp(), 1.0)
    assert evidence.to_dataset()["upper"].dims == ("data",)


@pytest.mark.filterwarnings("ignore:sequential_monte_carlo. gap")
def test_an_exact_sample_shows_a_mode_that_the_guide_misses():
    for z, names in ((-3.2, set()), (3.2, {"gap"})):
        evidence = sequential_monte_carlo(
            two_modes,
            one_mode,
            exact_sample={"z": torch.tensor(z).double()},
            check_prior=False,
            **FEW,
        ).evidence
        assert set(evidence.flags) == names
        assert "(exact sample)" in repr(evidence)
    assert evidence.upper > TWO_MODES - 0.1
    assert abs(evidence.log_evidence - (TWO_MODES - math.log(2))) < 0.1


def near_zero(num_points=3):
    with pyro.plate("data", num_points):
        z = pyro.sample("z", dist.Exponential(torch.tensor(1.0).double()))
        x = torch.full((num_points,), 0.5).double()
        pyro.sample("x", dist.Uniform(0.0, z, validate_args=False), obs=x)


def below_one(num_points=3):
    with pyro.plate("data", num_points):
        pyro.sample("z", dist.Uniform(torch.tensor(0.5).double(), 1.0))


ONES = torch.ones(3).double()


@pytest.mark.parametrize("function", [sequential_monte_carlo, annealed_importance_sampling])
@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ([ONES], "must be a dict from the name of each latent site"),
        ({"z": 1.0}, r"exact_sample\['z'\] must be a tensor, but it is 1.0"),
        ({"z": torch.ones(3, dtype=torch.long)}, "must have a floating-point dtype"),
        ({"z": ONES.to("meta")}, "is on meta, but the site is on cpu"),
        ({"z": ONES[0]}, r"has shape \(\), but the site has shape \(3,\)"),
        ({"z": ONES[:, None]}, r"has shape \(3, 1\), but the site has shape \(3,\)"),
        ({"z": -ONES}, "outside of the support"),
        ({"z": ONES * math.nan}, "outside of the support"),
        ({"y": ONES}, r"latent sites of the guide, \['z'\], but it has \['y'\]"),
        ({"z": torch.tensor([0.1, 1.0, 1.0])}, r"zero under the model for data points \[0\]"),
    ],
)
def test_bad_samples(function, sample, words):
    with pytest.raises((TypeError, ValueError), match=f"{function.__name__}: .*{words}"):
        function(near_zero, exact_sample=sample)


def test_a_sample_that_the_guide_misses():
    with pytest.raises(ValueError, match="support of this site of the guide"):
        sequential_monte_carlo(near_zero, below_one, exact_sample={"z": 2 * ONES})


def test_a_sample_takes_the_dtype_of_its_site():
    found = sequential_monte_carlo(near_zero, exact_sample={"z": ONES.float()}, **FEW)
    assert found.evidence.upper.isfinite().all()


@pytest.mark.long
def test_an_interrupt_leaves_the_exact_sample_out():
    options = {"exact_sample": {"z": torch.tensor(3.2).double()}, **FEW}
    counted = Interrupted(two_modes, 10**6)
    sequential_monte_carlo(counted, **options)
    interrupted = Interrupted(two_modes, 10**6 - counted.calls - 50)
    with pytest.warns(UserWarning, match="interrupted. The exact sample was not used"):
        evidence = sequential_monte_carlo(interrupted, **options).evidence
    assert evidence.upper is None
    assert len(evidence.by_run) == 8
