import math

import torch

from pyro_ext.infer.annealing.cloud import Cloud, next_step
from pyro_ext.infer.annealing.hmc import ChainState
from pyro_ext.infer.annealing.metric import Metric
from pyro_ext.infer.annealing.unconstrained import Densities


def cloud_of(log_w, num_runs):
    """Return a cloud at the positions 0, 1, ... with given log weights."""
    positions = torch.arange(log_w.numel(), dtype=torch.float64).reshape(*log_w.shape, 1)
    zero = torch.zeros_like(log_w)
    return Cloud.of_draws(ChainState(positions, Densities(log_w, zero, zero)), num_runs)


def test_each_run_and_data_point_is_resampled_in_proportion_to_its_weights():
    log_w = torch.tensor([[0.5, 0.5], [0.25, 0.5], [0.25, 1.0], [1.0, 1.0]] * 2).double().log()
    before = cloud_of(log_w, 2).reweighted(torch.ones(2).double())
    after = before.resampled(8)
    assert after.log_weights.shape == (2, 8, 2)
    counts = torch.stack(
        [(after.state.positions[..., 0] == x).sum(0) for x in range(log_w.numel())]
    ).sum(1)
    expected = torch.tensor([[2, 1, 1, 4], [4 / 3, 4 / 3, 8 / 3, 8 / 3]]).T.repeat(2, 1)
    assert (counts - expected.flatten()).abs().max() < 1
    assert torch.equal(after.log_z, before.log_z)
    assert torch.allclose(after.log_z[0], log_w[:4].exp().mean(0).log())
    # The first ancestor of a particle is the particle from which it was copied.
    index = after.state.positions[..., 0].reshape(2, 8, 2) // 2
    assert torch.equal(index - 4 * torch.arange(2).reshape(2, 1, 1), after.roots.double())


def test_a_run_without_weight_has_no_evidence():
    log_w = torch.tensor([0.0, 1.0, -math.inf, -math.inf]).double()
    found = cloud_of(log_w, 2).reweighted(torch.tensor(1.0).double())
    assert found.log_z[1] == -math.inf
    assert torch.allclose(found.log_weights.exp().sum(1), torch.ones(2).double())
    assert found.resampled(2).state.positions.isfinite().all()


def test_a_step_has_the_effective_sample_size():
    log_w = 30 * torch.randn(1000, 2).double()
    log_w[:100, 0] = -math.inf  # these do not count
    step = next_step(cloud_of(log_w, 4), torch.zeros(2).double(), 0.7)
    weights = (step * log_w).exp()
    ess = weights.sum(0).square() / weights.square().sum(0) / torch.tensor([900, 1000])
    assert torch.allclose(ess, torch.tensor(0.7).double())
    beta = torch.tensor([0.9999, 1.0]).double()
    step = next_step(cloud_of(log_w, 4), beta, 0.5)
    assert step.tolist() == [(1 - beta[0]).item(), 0.0]


def test_the_metric_has_the_covariance_of_the_weighted_particles():
    positions = torch.randn(4000, 2, 3).double()
    positions[..., 1] += 2 * positions[..., 0]
    weights = torch.rand(4000, 2).double()
    weights = weights / weights.sum(0)
    metric = Metric.of_cloud(positions, weights)
    found = metric.scale @ metric.scale.mT
    expected = torch.stack([torch.cov(positions[:, i].T, aweights=weights[:, i]) for i in (0, 1)])
    assert torch.allclose(found, expected, rtol=0.01, atol=0.01)
    slopes = torch.randn(5, 2, 3).double()
    assert torch.allclose(
        metric.to_momenta(slopes)[4, 1], metric.scale[1].T @ slopes[4, 1], atol=1e-12
    )
    few = Metric.of_cloud(positions[:10], weights[:10] / weights[:10].sum(0))
    assert few.scale.shape == (2, 3)
