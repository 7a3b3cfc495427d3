"""One draw of the globals and K of the locals in their plate give locally enhanced bounds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_ext.infer import ImportanceWeightedELBO
from tests.models import GlobalNormal, Hierarchical
from tests.registry import VECTORIZE
from tests.statistics import assert_mean_at_most
from tests.tracing.local_replicates import F64, X


@VECTORIZE
@pytest.mark.parametrize("subsample_size", [None, 2])
def test_one_draw_of_the_globals_and_k_of_the_locals(subsample_size, vectorize):
    programs = Hierarchical(X, subsample_size)
    elbo = ImportanceWeightedELBO(4, local_plate="data", vectorize_particles=vectorize)
    found = elbo.trace_particles(programs.model, programs.guide)
    size = subsample_size or len(X)
    assert [plate.name for plate in found.plates] == ["data"]
    assert found.log_w.shape == (4, size)
    assert found.scale == len(X) / size
    draws = {trace.nodes["theta"]["value"].item() for trace in found.guide_traces}
    assert len(draws) == 1
    trace = found.model_traces[0]
    theta, z, x = (trace.nodes[name]["value"] for name in ("theta", "z", "x"))
    assert theta.shape == ()
    log_ratio = dist.Normal(0.0, 1.0).log_prob(theta) - dist.Normal(0.1, 0.6).log_prob(theta)
    torch.testing.assert_close(found.outer, log_ratio.double())
    z = z.view(-1, size)[0]
    log_w = dist.Normal(theta, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    log_w = log_w - dist.Normal(0.4 * (theta + x), 1.3).log_prob(z)
    torch.testing.assert_close(found.log_w[0], log_w)


@pytest.mark.long
@VECTORIZE
def test_the_bound_is_valid_under_subsampling_and_between_the_elbo_and_the_evidence(vectorize):
    means = {}
    for subsample_size, K in [(None, 1), (None, 8), (2, 8)]:
        programs = Hierarchical(X, subsample_size)
        elbo = ImportanceWeightedELBO(K, local_plate="data", vectorize_particles=vectorize)
        num_draws = 200 if vectorize else 60
        draws = [-elbo.loss(programs.model, programs.guide) for _ in range(num_draws)]
        draws = torch.tensor(draws, **F64)
        assert_mean_at_most(draws, programs.log_evidence())
        means[subsample_size, K] = draws.mean(), draws.var() / len(draws)
    (elbo_mean, _), (full, full_variance), (minibatch, variance) = means.values()
    assert (full - minibatch).abs() < 4.5 * (full_variance + variance).sqrt()
    assert full > elbo_mean + 4.5 * full_variance.sqrt()


def test_one_particle_is_the_elbo():
    programs = Hierarchical(X, subsample_size=2)
    losses = []
    for elbo in (ImportanceWeightedELBO(1, local_plate="data"), Trace_ELBO()):
        pyro.set_rng_seed(2)
        losses.append(elbo.loss(programs.model, programs.guide))
    assert losses[0] == pytest.approx(losses[1])


@VECTORIZE
def test_data_of_a_global_inside_of_the_local_plate(vectorize):
    """y depends on theta alone: whether it keeps the inner plate common is the same looped."""
    y, x = X[:3, None], torch.arange(6.0, **F64).reshape(3, 2)

    def model():
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
            with pyro.plate("columns", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(theta, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        pyro.sample("theta", dist.Normal(y.new_zeros(()), 0.1))
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))

    elbo = ImportanceWeightedELBO(4, local_plate="rows", vectorize_particles=vectorize)
    found = elbo.trace_particles(model, guide)
    assert [plate.name for plate in found.plates] == ["rows", "columns"]


def test_refusal_of_a_subsampled_plate_points_to_the_local_plate():
    programs = Hierarchical(X, subsample_size=2)
    with pytest.raises(ValueError, match="local_plate='data'"):
        ImportanceWeightedELBO(3).loss(programs.model, programs.guide)


@VECTORIZE
def test_sites_outside_that_see_the_local_draws_are_refused_by_name(vectorize):
    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        total = z.sum(-1, keepdim=True)
        pyro.sample("x", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    elbo = ImportanceWeightedELBO(
        3, local_plate="data", vectorize_particles=vectorize, max_plate_nesting=1
    )
    with pytest.raises(ValueError, match="'x' of the model depends on the draws inside"):
        elbo.loss(model, guide)


@VECTORIZE
@pytest.mark.parametrize("family", ["Normal", "Bernoulli"])
@pytest.mark.parametrize("keepdim", [True, False])
def test_every_dependence_outside_is_refused(keepdim, family, vectorize):
    """A discrete draw may be the same in all particles; a sum may run over the particle dim."""

    def draw():
        fn = dist.Normal(0.0, 1.0) if family == "Normal" else dist.Bernoulli(0.4)
        with pyro.plate("data", 1):
            return pyro.sample("z", fn)

    def model():
        z = draw()
        total = z.sum(-1, keepdim=True) if keepdim else z.sum()
        pyro.sample("x", dist.Normal(total, 1.0), obs=total.new_zeros(()))

    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1, "local_plate": "data"}
    for _ in range(5):
        with pytest.raises(ValueError, match="'x' of the model depends on the draws inside"):
            ImportanceWeightedELBO(2, **options).loss(model, draw)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("K", [1, 3])
@VECTORIZE
def test_nan_outside_is_named(vectorize, K):
    def guide():
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        nan = torch.tensor(float("nan"))
        pyro.sample("y", dist.Normal(theta, 1.0, validate_args=False), obs=nan)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    elbo = ImportanceWeightedELBO(K, local_plate="data", vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="log-probability of site 'y' of the model is NaN"):
        elbo.loss(model, guide)


@VECTORIZE
def test_guides_with_one_joint_draw_are_refused(vectorize):
    programs = Hierarchical(X)
    guide = AutoMultivariateNormal(programs.model)
    elbo = ImportanceWeightedELBO(3, local_plate="data", vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="the guide draws no latent site inside the plate"):
        elbo.loss(programs.model, guide)


def test_bad_arguments():
    with pytest.raises(TypeError, match="local_plate must be the name of a plate, but it is 3"):
        ImportanceWeightedELBO(2, local_plate=3)
    with pytest.raises(
        NotImplementedError, match="local_plate does not support particle_chunk_size"
    ):
        ImportanceWeightedELBO(20, local_plate="data", particle_chunk_size=5)
    programs = Hierarchical(X)
    with pytest.raises(ValueError, match=r"not one of the vectorised plates, \['data'\]"):
        ImportanceWeightedELBO(2, local_plate="rows").loss(programs.model, programs.guide)
    programs = GlobalNormal(X)
    with pytest.raises(ValueError, match=r"no latent site inside the plate.*sites \['x'\]"):
        ImportanceWeightedELBO(2, local_plate="data").loss(programs.model, programs.guide)

    def sequential():
        for i in pyro.plate("data", 2):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"not one of the vectorised plates, \[\]"):
        ImportanceWeightedELBO(2, local_plate="data").loss(sequential, sequential)
