"""BayesianModule over many kinds of modules, against one call for each draw."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.func import functional_call

from pyro_ext.distributions import NormalScaleMixture
from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.nn import BayesianModule, MeanFieldGuide
from tests.statistics import assert_mean

NORMAL = dist.Normal(0.0, 0.3)


class LastOutput(nn.Module):
    """A recurrent network and a linear layer on its last output."""

    def __init__(self, kind):
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.recurrent(x)[0][:, -1])


class Tied(nn.Module):
    """An autoencoder whose two layers share the weights, and a scalar parameter."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.gain * self.decoder(self.encoder(x).tanh())


class GraphConvolution(nn.Module):
    """Two layers of A relu(A x W1) W2, with the normalised adjacency A as a buffer."""

    def __init__(self):
        super().__init__()
        adjacency = torch.eye(5) + torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
        degree = adjacency.sum(0)
        self.register_buffer("adjacency", adjacency / (degree * degree.unsqueeze(1)).sqrt())
        self.first = nn.Parameter(torch.randn(3, 4))
        self.second = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        hidden = (self.adjacency @ x @ self.first).relu()
        return self.adjacency @ hidden @ self.second


class Dictionary(nn.Module):
    """An output that is a dict, with a tuple in it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, shift=0.0):
        y = self.linear(x) + shift
        return {"mean": y, "parts": (y.square(), y[..., :1])}


def convolutional(norm):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


#: name -> (module, shape of its input, whether it runs under vmap in training mode)
NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3), True),
    "convolution": (lambda: convolutional(nn.Identity()), (5, 1, 8, 8), True),
    "batch norm without statistics": (
        lambda: convolutional(nn.BatchNorm2d(4, track_running_stats=False)),
        (5, 1, 8, 8),
        True,
    ),
    "batch norm with statistics": (lambda: convolutional(nn.BatchNorm2d(4)), (5, 1, 8, 8), False),
    "lstm": (lambda: LastOutput(nn.LSTM), (5, 6, 3), False),
    "gru": (lambda: LastOutput(nn.GRU), (5, 6, 3), False),
    "rnn": (lambda: LastOutput(nn.RNN), (5, 6, 3), False),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        (5, 3, 4),
        None,
    ),
    "tied": (Tied, (5, 3), True),
    "graph convolution": (GraphConvolution, (5, 3), True),
    "bilinear": (lambda: Square(nn.Bilinear(3, 3, 2)), (5, 3), False),
    "dictionary": (Dictionary, (5, 3), True),
}


class Square(nn.Module):
    """A module of two inputs, given the same one twice."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x)


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def draw(module, leading):
    """Values for every latent site."""
    return {
        name: 0.3 * torch.randn((*leading, *module.value_of(name).shape))
        for name in module.latent_names
    }


def run(module, values, *args, **kwargs):
    return poutine.condition(module, data=values)(*args, **kwargs)


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


@pytest.mark.parametrize("leading", [(4,), (4, 1), (4, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("name", NETS)
def test_many_draws_are_the_draws_one_by_one(name, leading):
    make, shape, is_vectorized = NETS[name]
    net = make()
    module = BayesianModule(net, NORMAL)
    x = torch.randn(shape)
    values = draw(module, leading)
    kept = [size for size in leading if size > 1]
    flat = {n: v.reshape(-1, *module.value_of(n).shape) for n, v in values.items()}
    num_draws = len(next(iter(flat.values())))

    state = torch.get_rng_state()
    output = leaves(run(module, values, x))
    again = leaves(run(module, values, x))
    assert torch.equal(state, torch.get_rng_state())
    if is_vectorized is not None:
        assert list(module._call._is_looped.values()) == [not is_vectorized]
    torch.testing.assert_close(output, again, rtol=0, atol=0)
    single = [
        leaves(functional_call(copy.deepcopy(net), {n: v[i] for n, v in flat.items()}, (x,)))
        for i in range(num_draws)
    ]
    for position, found in enumerate(output):
        expected = torch.stack([each[position] for each in single])
        expected = expected.reshape(*kept, *expected.shape[1:])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_draws_that_differ_in_leading_dims_broadcast():
    module = BayesianModule(nn.Linear(3, 2), NORMAL)
    x = torch.randn(5, 3)
    weight, bias = torch.randn(4, 1, 2, 3), torch.randn(2)
    output = run(module, {"weight": weight, "bias": bias}, x)
    torch.testing.assert_close(output, x @ weight.squeeze(1).mT + bias)


def test_gradients_of_many_draws():
    for name in ("mlp", "lstm"):
        make, shape, _ = NETS[name]
        module = BayesianModule(make(), NORMAL)
        x = torch.randn(shape)
        values = {n: v.requires_grad_() for n, v in draw(module, (3, 1)).items()}
        together = torch.autograd.grad(run(module, values, x).square().sum(), [*values.values()])
        apart = [
            torch.autograd.grad(
                run(module, {n: v[i, 0] for n, v in values.items()}, x).square().sum(),
                [*values.values()],
            )
            for i in range(3)
        ]
        torch.testing.assert_close(
            list(together), [sum(g) for g in zip(*apart, strict=True)], rtol=1e-4, atol=1e-5
        )


def test_running_statistics_see_every_draw():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module = BayesianModule(net, NORMAL)
    x = torch.randn(6, 3)
    values = draw(module, (5, 1))
    run(module, values, x)
    for i in range(5):
        functional_call(net, {n: v[i, 0] for n, v in values.items()}, (x,))
    statistics = dict(module.net.named_buffers())
    for name, expected in net.named_buffers():
        torch.testing.assert_close(statistics[name], expected)
    module.eval()
    assert run(module, values, x).shape == (5, 6, 4)
    assert list(module._call._is_looped.values()) == [True, False]


def test_dropout_differs_between_draws():
    module = BayesianModule(nn.Sequential(nn.Linear(3, 40), nn.Dropout()), NORMAL)
    values = {"0.weight": torch.ones(2, 1, 40, 3), "0.bias": torch.ones(2, 1, 40)}
    first, second = run(module, values, torch.ones(1, 3))
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(*run(module, values, torch.ones(1, 3)))


def test_an_error_of_the_module_is_its_own_and_changes_nothing():
    module = BayesianModule(nn.Linear(3, 2), NORMAL)
    values = draw(module, (4, 1))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(module, values, torch.randn(5, 7))
    assert run(module, values, torch.randn(5, 3)).shape == (4, 5, 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(module, values, torch.randn(5, 7))
    assert list(module._call._is_looped.values()) == [False]


class Classifier(PyroModule):
    """A net inside of another module, whose name is then before those of the sites."""

    def __init__(self, net, prior=NORMAL, **options):
        super().__init__()
        self.net = BayesianModule(net, prior, **options)

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def data(shape):
    x = torch.randn(shape)
    return x, (x.flatten(1).sum(1) > 0).long()


@pytest.mark.parametrize("is_vectorized", [True, False])
@pytest.mark.parametrize("name", ["mlp", "convolution", "lstm"])
def test_training_decreases_the_loss(name, is_vectorized):
    make, shape, _ = NETS[name]
    model = Classifier(make())
    guide = MeanFieldGuide(model.net)
    x, y = data((40, *shape[1:]))
    elbo = Trace_ELBO(3, vectorize_particles=is_vectorized, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = [svi.step(x, y) for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", ["mlp", "convolution", "lstm"])
def test_predictive_in_parallel(name):
    make, shape, _ = NETS[name]
    model = Classifier(make())
    guide = MeanFieldGuide(model.net)
    x, _ = data(shape)
    for options in ({}, {"guide": guide}):
        samples = Predictive(model, num_samples=7, parallel=True, **options)(x)
        assert samples["y"].shape == (7, 5)
        one_by_one = Predictive(model, num_samples=7, **options)(x)
        assert {n: v.numel() for n, v in samples.items()} == {
            n: v.numel() for n, v in one_by_one.items()
        }


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
        losses.append([elbo.loss(model, guide, x, y) for _ in range(100)])
    vectorized, looped = torch.tensor(losses)
    assert_mean(vectorized - looped, 0.0)


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


class Clipped(nn.Module):
    """Outputs that are no tensors, and a branch on values, which vmap does not take."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, clip=False):
        y = self.linear(x)
        if clip and y.max() > 0.1:
            y = y.clamp(max=0.1)
        return (y, None, 3) if clip else y


def test_branches_and_other_outputs_are_looped():
    module = BayesianModule(Clipped(), NORMAL)
    x = torch.randn(5, 3)
    values = draw(module, (4, 1))
    plain = run(module, values, x)
    clipped, nothing, number = run(module, values, x, clip=True)
    torch.testing.assert_close(clipped, plain.clamp(max=0.1))
    assert (nothing, number) == (None, 3)
    assert list(module._call._is_looped.values()) == [False, True]


def test_learnt_priors_are_followed():
    scale = nn.Parameter(torch.tensor(1.0))
    module = BayesianModule(nn.Linear(3, 2).double(), dist.Normal(0.0, scale))
    x = torch.randn(5, 3).double()
    for value in (1.0, 3.0):
        scale.data.fill_(value)
        trace = poutine.trace(copy.deepcopy(module) if value == 1.0 else module).get_trace(x)
        assert trace.nodes["weight"]["fn"].base_dist.scale.unique().item() == value
    module.prior = dist.Normal(0.0, 7.0)
    assert module.prior_of("weight").base_dist.scale.unique().item() == 7.0
    module.prior = dist.Normal(0.0, 8.0)
    assert module.prior_of("weight").base_dist.scale.unique().item() == 8.0


def test_hyperparameters_are_not_the_mean_field_guides():
    def prior(name, parameter):
        return dist.Normal(0.0, pyro.sample(f"{name}_scale", dist.Gamma(2.0, 1.0)))

    model = Classifier(nn.Linear(3, 2), prior)
    mean_field = MeanFieldGuide(model.net)

    def guide(x, y):
        for name in ("weight", "bias"):
            pyro.sample(f"{name}_scale", dist.Delta(torch.tensor(2.0)))
        mean_field(x, y)

    assert set(poutine.trace(mean_field).get_trace().stochastic_nodes) == {
        "net.weight",
        "net.bias",
    }
    assert Trace_ELBO().differentiable_loss(model, guide, *data((5, 3))).isfinite()


def test_priors_by_name_and_hyperparameters():
    def prior(name, parameter):
        scale = pyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
        return dist.Normal(torch.zeros(parameter.shape), scale).to_event(parameter.dim())

    module = BayesianModule(nn.Linear(3, 2), prior)
    trace = poutine.trace(module).get_trace(torch.randn(5, 3))
    scale = trace.nodes["weight_scale"]["value"]
    assert torch.equal(trace.nodes["weight"]["fn"].base_dist.scale[0, 0], scale)


def test_dtype_follows_the_module():
    prior = NormalScaleMixture(torch.tensor([1.0, 0.1]), probs=torch.tensor([0.5, 0.5]))
    model = Classifier(nn.Linear(3, 2), prior).double()
    guide = MeanFieldGuide(model.net)
    x, y = data((5, 3))
    x = x.double()
    for values in (poutine.trace(model).get_trace(x), poutine.trace(guide).get_trace()):
        assert values.nodes["net.weight"]["value"].dtype == torch.float64
    assert Trace_ELBO().differentiable_loss(model, guide, x, y).dtype == torch.float64
    assert prior.scales.dtype == torch.float32
    model.float()
    assert poutine.trace(model).get_trace(x.float()).nodes["net.weight"]["value"].dtype == (
        torch.float32
    )


@pytest.mark.parametrize("transform", [dist.transforms.AffineTransform(torch.ones(()), 2.0)])
def test_transformed_priors_follow_too(transform):
    prior = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])
    module = BayesianModule(nn.Linear(3, 2), prior).double()
    trace = poutine.trace(module).get_trace(torch.randn(5, 3).double())
    assert trace.nodes["weight"]["value"].dtype == torch.float64


def test_copies_pickles_and_states():
    torch.manual_seed(1)
    module = BayesianModule(NETS["mlp"][0](), NORMAL)
    guide = MeanFieldGuide(module)
    x = torch.randn(5, 3)
    values = draw(module, (3, 1))
    expected = run(module, values, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(run(twin, values, x), expected)
    other = BayesianModule(NETS["mlp"][0](), NORMAL)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other.value_of("0.weight"), module.value_of("0.weight"))
    twin = copy.deepcopy(guide)
    twin.load_state_dict(guide.state_dict())
    assert {n: v.shape for n, v in twin().items()} == {n: v.shape for n, v in guide().items()}


def test_mean_field_guide_begins_where_it_is_told():
    net = nn.Linear(3, 2)
    module = BayesianModule(net, NORMAL)
    own = MeanFieldGuide(module, init_scale=1e-3).distributions()
    torch.testing.assert_close(own["weight"].base_dist.loc, net.weight)
    torch.testing.assert_close(own["bias"].base_dist.scale, torch.full((2,), 1e-3))
    zero = MeanFieldGuide(module, init_loc=lambda name, value: torch.zeros_like(value))
    assert not zero.distributions()["weight"].base_dist.loc.any()


def test_mean_field_guide_on_constrained_supports():
    def prior(name, parameter):
        return dist.LogNormal(0.0, 0.5) if name == "1.weight" else NORMAL

    module = BayesianModule(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), prior)
    guide = MeanFieldGuide(module, init_scale=0.5)
    posterior = guide.distributions()["1.weight"]
    draws = posterior.sample((1000,))
    assert (draws > 0).all()
    assert posterior.event_shape == (4,)
    torch.testing.assert_close(draws.log().mean(), torch.tensor(0.0), atol=0.05, rtol=0)
    model = Classifier(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), prior)
    x, y = data((5, 3))
    elbo = TraceMeanField_ELBO()
    assert elbo.differentiable_loss(model, MeanFieldGuide(model.net), x, y).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BayesianModule(nn.Tanh(), NORMAL), "module with parameters, and Tanh has none"),
        (lambda: BayesianModule(nn.LazyLinear(2), NORMAL), "'weight' has no shape yet"),
        (
            lambda: BayesianModule(nn.Linear(3, 2, dtype=torch.complex64), NORMAL),
            "expected real parameters, and 'weight' is torch.complex64",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.Normal(torch.zeros(5), 1.0)),
            r"shape \(2, 3\) of parameter 'weight', got one of batch shape \(5,\) and event",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.MultivariateNormal(*[torch.eye(2)] * 2)),
            r"shape \(2, 3\) of parameter 'weight'",
        ),
        (lambda: BayesianModule(nn.Linear(3, 2), dist.Bernoulli(0.5)), "support holds .* 'weight'"),
        (
            lambda: BayesianModule(nn.Linear(3, 2), dist.HalfNormal(1.0)),
            "support holds .* 'weight'",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), NORMAL, sites=lambda name: False),
            r"has \['weight', 'bias'\], and it matches none",
        ),
        (
            lambda: BayesianModule(nn.Linear(3, 2), NORMAL, sites=["scale"]),
            r"got \['scale'\] among them",
        ),
        (lambda: BayesianModule(nn.Linear(3, 2), NORMAL, sites="weight"), "got 'weight'"),
        (
            lambda: MeanFieldGuide(BayesianModule(nn.Linear(3, 2), NORMAL), init_scale=0.0),
            "init_scale must be positive and finite, but it is 0",
        ),
        (
            lambda: MeanFieldGuide(
                BayesianModule(nn.Linear(3, 2), NORMAL), init_loc=lambda name, value: value[:1]
            ),
            r"shape \(2, 3\) for 'weight', got \(1, 3\)",
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
