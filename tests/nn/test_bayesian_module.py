"""BayesianModule makes latent sites of a module's parameters."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_ext.distributions import NormalScaleMixture
from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.nn import BayesianModule, MeanFieldGuide
from tests.nn.networks import NETS, NORMAL, Classifier, Tied, data, draw, leaves, run
from tests.statistics import assert_mean


@pytest.mark.parametrize("name", NETS)
def test_one_site_for_each_parameter_and_the_outputs_of_the_net(name):
    make, shape, _ = NETS[name]
    net = make()
    module = BayesianModule(net, NORMAL)
    x = torch.randn(shape)
    trace = poutine.trace(module).get_trace(x)
    sites = [n for n, site in trace.nodes.items() if site["type"] == "sample"]
    assert sites == list(module.latent_names) == [n for n, _ in net.named_parameters()]
    for n, parameter in net.named_parameters():
        site = trace.nodes[n]
        assert site["value"].shape == parameter.shape
        assert site["fn"].batch_shape == ()
    assert not list(module.parameters())

    own = {n: p.detach() for n, p in net.named_parameters()}
    found, expected = leaves(run(module, own, x)), leaves(net(x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_chosen_parameters_are_latent_and_others_are_learnt():
    net = NETS["mlp"][0]()
    model = Classifier(net, sites=lambda name: name.startswith("2."))
    assert model.net.latent_names == ("2.weight", "2.bias")
    guide = MeanFieldGuide(model.net)
    x, y = data((20, 3))
    before = model.net.net[0].weight.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    store = pyro.get_param_store()
    assert sorted(n for n in store if "net$$$" in n) == ["net.net$$$0.bias", "net.net$$$0.weight"]
    assert not torch.equal(model.net.net[0].weight, before)
    torch.testing.assert_close(net[0].weight.detach(), before, rtol=0, atol=0)
    by_name = BayesianModule(net, NORMAL, sites=["0.bias"])
    assert by_name.latent_names == ("0.bias",)


def test_tied_parameters_are_one_site():
    module = BayesianModule(Tied(), NORMAL)
    assert module.latent_names == ("gain", "encoder.weight", "encoder.bias")
    x = torch.randn(5, 3)
    values = draw(module, ())
    hidden = (x @ values["encoder.weight"].mT + values["encoder.bias"]).tanh()
    expected = values["gain"] * hidden @ values["encoder.weight"].mT
    torch.testing.assert_close(run(module, values, x), expected)


@pytest.mark.parametrize("convert", [lambda m: m.double(), copy.deepcopy, lambda m: m.to("cpu")])
def test_tied_parameters_stay_tied(convert):
    module = convert(BayesianModule(Tied(), NORMAL))
    dtype = module.value_of("gain").dtype
    values = {name: value.to(dtype) for name, value in draw(module, (2, 1)).items()}
    x = torch.randn(5, 3, dtype=dtype)
    weight, bias = values["encoder.weight"][:, 0], values["encoder.bias"]
    expected = values["gain"][..., None] * (x @ weight.mT + bias).tanh() @ weight.mT
    torch.testing.assert_close(run(module, values, x), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "autoguide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta]
)
def test_autoguides(autoguide):
    model = Classifier(nn.Linear(3, 2))
    guide = autoguide(model)
    x, y = data((5, 3))
    elbo = Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [svi.step(x, y) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
def test_multi_sample_bounds_and_their_check():
    prior = NormalScaleMixture(torch.tensor([1.0, 0.1]), probs=torch.ones(2))
    model = Classifier(NETS["mlp"][0](), prior)
    guide = MeanFieldGuide(model.net)
    x, y = data((5, 3))
    elbo = ImportanceWeightedELBO(6, max_plate_nesting=1)
    elbo.check(model, guide, x, y)
    losses = []
    for is_vectorized in (True, False):
        elbo = ImportanceWeightedELBO(6, vectorize_particles=is_vectorized, max_plate_nesting=1)
        losses.append([elbo.loss(model, guide, x, y) for _ in range(40)])
    vectorized, looped = torch.tensor(losses)
    assert_mean(vectorized - looped, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BayesianModule(nn.Tanh(), NORMAL), "Tanh has no parameters"),
        (lambda: BayesianModule(nn.LazyLinear(2), NORMAL), "'weight' has no shape yet"),
        (
            lambda: BayesianModule(nn.Linear(3, 2, dtype=torch.complex64), NORMAL),
            "parameter 'weight' has dtype torch.complex64",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.Normal(torch.zeros(5), 1.0)),
            r"prior of 'weight' has batch shape \(5,\) and event .* shape, \(2, 3\)",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.MultivariateNormal(*[torch.eye(2)] * 2)),
            r"prior of 'weight' has .* expands to the parameter's shape, \(2, 3\)",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.Bernoulli(0.5)),
            "prior of 'weight' is discrete",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.HalfNormal(1.0)),
            "support of the prior of 'weight' does not contain",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), NORMAL, sites=lambda name: False),
            r"sites matches none of the parameters \['weight', 'bias'\]",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), NORMAL, sites=["scale"]),
            r"sites names \['scale'\], but the parameters are \['weight', 'bias'\]",
        ),
        (lambda: BayesianModule(nn.Linear(3, 2), NORMAL, sites="weight"), "sites is 'weight'"),
        (
            lambda: MeanFieldGuide(BayesianModule(nn.Linear(3, 2), NORMAL), init_scale=0.0),
            "init_scale must be positive and finite, but it is 0",
        ),
        (
            lambda: MeanFieldGuide(
                BayesianModule(nn.Linear(3, 2), NORMAL), init_loc=lambda name, value: value[:1]
            ),
            r"init_loc returns shape \(1, 3\) for 'weight'.* shape, \(2, 3\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BayesianModule("net", NORMAL), "net must be a plain torch.nn.Module, .* 'net'"),
        (lambda: BayesianModule(PyroModule[nn.Linear](2, 1), NORMAL), "plain torch.nn.Module"),
        (lambda: BayesianModule(nn.Linear(3, 2), 0.3), "prior must be a Pyro distribution"),
        (
            lambda: BayesianModule(nn.Linear(3, 2), lambda name, parameter: 1.0),
            r"prior of 'weight' must be a Pyro distribution, but it is 1\.0",
        ),
        (lambda: MeanFieldGuide(nn.Linear(3, 2)), "module must be a BayesianModule, .* a Linear"),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
