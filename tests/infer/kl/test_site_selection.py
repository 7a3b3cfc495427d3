"""The sites that are weighted are the global ones, or those that are chosen."""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch.distributions import kl_divergence

from pyro_ext.infer import KLWeightedELBO
from tests.infer.kl.objectives import ConstantKL


def plates_pair(plates_of_w, plates_of_x):
    """A site w and an observed site x in plates: a of size 2 at dim -1, b of size 3 at dim -2."""
    sizes = {"a": 2, "b": 3}

    def make_plates():
        return {"a": pyro.plate("a", sizes["a"], dim=-1), "b": pyro.plate("b", sizes["b"], dim=-2)}

    def model():
        plates = make_plates()
        with ExitStack() as stack:
            for name in plates_of_w:
                stack.enter_context(plates[name])
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with ExitStack() as stack:
            for name in plates_of_x:
                stack.enter_context(plates[name])
            x = torch.zeros([sizes[name] for name in reversed(plates_of_x)])
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide():
        plates = make_plates()
        with ExitStack() as stack:
            for name in plates_of_w:
                stack.enter_context(plates[name])
            pyro.sample("w", dist.Normal(0.3, 0.5))

    return model, guide


@pytest.mark.parametrize(
    ("plates_of_w", "plates_of_x", "is_global"),
    [
        ("", "a", True),
        ("a", "a", False),
        ("b", "ab", True),
        ("ab", "a", False),
        ("b", "a", True),
    ],
)
def test_global_sites_are_those_that_data_points_share(plates_of_w, plates_of_x, is_global):
    model, guide = plates_pair(plates_of_w, plates_of_x)
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(0.5))
    if is_global:
        elbo.loss(model, guide)
    else:
        with pytest.raises(
            ValueError, match=r"sites, which is 'global', matches none of .*\['w'\]"
        ):
            elbo.loss(model, guide)


def test_without_plates_every_site_is_global():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=torch.zeros(3))

    def guide():
        pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))

    kl = kl_divergence(dist.Normal(0.0, 2.0), dist.Normal(0.0, 1.0)) * 3
    losses = []
    for factor in (0.0, 1.0):
        pyro.set_rng_seed(1)
        elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(factor))
        losses.append(elbo.loss(model, guide))
    assert losses[1] - losses[0] == pytest.approx(kl.item(), rel=1e-5)


def test_a_factor_on_weights_does_not_make_them_local():
    def model():
        with pyro.plate("weights", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.factor("penalty", -w.abs())
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("weights", 3):
            pyro.sample("w", dist.Normal(3.0, 0.5))

    losses = []
    for factor in (0.0, 1.0):
        pyro.set_rng_seed(1)
        elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(factor))
        losses.append(elbo.loss(model, guide))
    kl = 3 * kl_divergence(dist.Normal(3.0, 0.5), dist.Normal(0.0, 1.0))
    assert losses[1] - losses[0] == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("sites", ["all", lambda name: name != "z1"])
def test_sites_that_come_later_are_weighted_too(sites):
    def model(num_sites):
        for i in range(num_sites):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def guide(num_sites):
        for i in range(num_sites):
            pyro.sample(f"z{i}", dist.Normal(3.0, 1.0))

    elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(0.0), sites)
    nll = 0.9189385
    assert elbo.loss(model, guide, 1) == pytest.approx(nll)
    assert elbo.loss(model, guide, 3) == pytest.approx(nll + (0.0 if sites == "all" else 4.5))


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_auxiliary_sites_of_autoguides_follow(guide, factor):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, b), obs=torch.tensor(1.5))

    guide = guide(model)
    guide()
    pyro.set_rng_seed(1)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    nll = -model_trace.nodes["x"]["fn"].log_prob(torch.tensor(1.5))
    kl = guide_trace.log_prob_sum() - model_trace.log_prob_sum() - nll
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(factor))
    pyro.set_rng_seed(1)
    assert elbo.loss(model, guide) == pytest.approx((factor * kl + nll).item(), rel=1e-5)


def test_a_joint_guide_of_weighted_and_other_sites_is_refused():
    x = torch.randn(5)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    joint, apart = AutoMultivariateNormal(model), AutoNormal(model)
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(0.5))
    with pytest.raises(ValueError, match=r"_latent' .*weighted sites \['w'\] .* \['z'\]\. Use a"):
        elbo.loss(model, joint)
    elbo.loss(model, apart)
    KLWeightedELBO(Trace_ELBO(), ConstantKL(0.5), sites="all").loss(model, joint)

    parts = AutoGuideList(model)
    parts.append(AutoMultivariateNormal(poutine.block(model, expose=["w"])))
    parts.append(AutoNormal(poutine.block(model, expose=["z"])))
    elbo.loss(model, parts)
    pyro.set_rng_seed(1)
    trace = poutine.trace(parts).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    kl_w = sum(
        site["fn"].log_prob(site["value"]).sum()
        for name, site in trace.nodes.items()
        if name == "w" or name.endswith("_latent")
    )
    kl_w = kl_w - dist.Normal(0.0, 1.0).log_prob(trace.nodes["w"]["value"])
    plain = trace.log_prob_sum() - replayed.log_prob_sum()
    pyro.set_rng_seed(1)
    assert elbo.loss(model, parts) == pytest.approx((plain - 0.5 * kl_w).item(), rel=1e-5)
