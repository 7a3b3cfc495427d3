"""flipout and local reparameterisation: the distribution of outputs, gradients, and refusals."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_ext.infer import GeometricKL, ImportanceWeightedELBO, KLWeightedELBO, estimate_evidence
from pyro_ext.nn import BayesianModule, MeanFieldGuide, flipout, local_reparameterization
from tests.statistics import assert_mean

HANDLERS = {"flipout": flipout, "local_reparameterization": local_reparameterization}
NORMAL = dist.Normal(0.0, 1.0)
NUM_DRAWS = 500


def outputs(handler, net, x, init_scale=0.5, num_draws=NUM_DRAWS):
    """Outputs of many runs, each with weights that the guide draws."""
    module = BayesianModule(net, NORMAL)
    guide = MeanFieldGuide(module, init_scale=init_scale)
    found = []
    with torch.no_grad(), handler():
        for _ in range(num_draws):
            trace = poutine.trace(guide).get_trace()
            found.append(poutine.replay(module, trace=trace)(x))
    return torch.stack(found)


def assert_covariance(draws, expected):
    """Products of centred draws have a mean; the draws' own mean is known to be ``0``."""
    assert_mean(draws.unsqueeze(-1) * draws.unsqueeze(-2), expected)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", HANDLERS)
def test_examples_have_the_right_moments_and_are_uncorrelated(name, has_bias):
    net = nn.Linear(3, 2, bias=has_bias)
    x = torch.tensor([[1.0, -0.5, 2.0], [1.0, -0.5, 2.0], [0.3, 0.0, -1.0], [0.0, 0.0, 0.0]])
    draws = outputs(HANDLERS[name], net, x)
    centered = (draws - net(x).detach()).transpose(1, 2)  # (draws, outputs, examples)
    variance = 0.25 * (x.square().sum(1) + has_bias)
    assert_mean(centered, 0.0)
    assert_covariance(centered, torch.diag(variance))


def test_plain_draws_are_correlated_between_examples():
    net = nn.Linear(3, 2, bias=False)
    x = torch.tensor([[1.0, -0.5, 2.0], [1.0, -0.5, 2.0]])
    module = BayesianModule(net, NORMAL)
    guide = MeanFieldGuide(module, init_scale=0.5)
    trace = poutine.trace(guide).get_trace()
    first, second = poutine.replay(module, trace=trace)(x)
    assert torch.equal(first, second)


class SumOverPositions(nn.Module):
    """Weights that four positions of an example share."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.linear(x).sum(1)


def test_flipout_keeps_weights_that_positions_share():
    x = torch.tensor([[0.6, 0.2], [0.5, -0.1], [0.7, 0.3], [0.4, 0.1]]).expand(3, 4, 2)
    net = SumOverPositions()
    centered = (outputs(flipout, net, x) - net(x).detach()).transpose(1, 2)
    shared = 0.25 * x[0].sum(0).square().sum()
    apart = 0.25 * x[0].square().sum()
    assert shared > 2 * apart
    assert_covariance(centered, torch.eye(3) * shared)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3), (7,)),
    "2d, strides": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (5, 5)),
    "2d, circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 4)),
    "2d, groups": (nn.Conv2d(4, 6, 2, groups=2), (3, 3)),
    "2d, dilation": (nn.Conv2d(2, 3, 2, dilation=2), (4, 4)),
    "3d": (nn.Conv3d(1, 2, 2), (3, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2), (4,)),
    "transposed 2d, groups": (nn.ConvTranspose2d(2, 4, 2, groups=2), (3, 3)),
    "transposed 3d": (nn.ConvTranspose3d(1, 2, 2), (2, 2, 2)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flipout_of_convolutions_keeps_the_covariance_of_each_example(name):
    net, shape = CONVOLUTIONS[name]
    x = torch.randn(1, net.in_channels, *shape).repeat(2, *(1,) * (1 + len(shape)))
    centered = (outputs(flipout, net, x, num_draws=250) - net(x).detach()).flatten(2)

    def call(weight, bias):
        return torch.func.functional_call(net, {"weight": weight, "bias": bias}, x[:1]).flatten()

    jacobians = torch.func.jacrev(call, argnums=(0, 1))(net.weight.detach(), net.bias.detach())
    rows = torch.cat([jacobian.flatten(1) for jacobian in jacobians], -1)
    expected = 0.25 * rows @ rows.mT
    probes = torch.randn(6, len(rows)) / len(rows) ** 0.5
    projected = centered @ probes.mT  # (draws, examples, probes)
    assert_mean(projected[:, 0] * projected[:, 1], 0.0)
    assert_mean(projected[:, 0].square(), (probes @ expected @ probes.mT).diagonal())
    assert_mean(projected[:, 1].square(), (probes @ expected @ probes.mT).diagonal())


class Regression(nn.Module):
    def __init__(self, net, prior=NORMAL):
        super().__init__()
        self.net = BayesianModule(net, prior)

    def forward(self, x, y):
        loc = self.net(x).flatten()
        with pyro.plate("data", 5 * len(x), subsample=x):
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def cnn():
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))


def gradients(handler, elbo, net, guide_class, num_draws):
    """Gradients of many losses of the same pair on the same data."""
    torch.manual_seed(3)
    x = torch.randn(24, 1, 3) if isinstance(net[0], nn.Conv1d) else torch.randn(24, 3)
    y = x.flatten(1).sum(1)
    model = Regression(net)
    guide = guide_class(model.net) if guide_class is MeanFieldGuide else guide_class(model)
    loss = elbo(model, guide)
    loss(x, y)
    parameters = list(guide.parameters())
    found = []
    with pyro.validation_enabled(False):
        for _ in range(num_draws):
            with nullcontext() if handler is None else handler():
                value = loss(x, y)
            grads = torch.autograd.grad(value, parameters)
            found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


@pytest.mark.long
@pytest.mark.parametrize("guide_class", [MeanFieldGuide, AutoNormal])
@pytest.mark.parametrize(
    ("handler", "make_net"),
    [(flipout, mlp), (local_reparameterization, mlp), (flipout, cnn)],
)
def test_gradients_have_the_same_mean_and_less_variance(handler, make_net, guide_class):
    torch.manual_seed(2)
    net = make_net()
    elbo = TraceMeanField_ELBO()
    plain = gradients(None, elbo, net, guide_class, 150)
    quiet = gradients(handler, elbo, net, guide_class, 150)
    error = ((plain.var(0) + quiet.var(0)) / 150).sqrt()
    assert ((plain.mean(0) - quiet.mean(0)).abs() <= 4.5 * error).all()
    ratio = (quiet.var(0).sum() / plain.var(0).sum()).item()
    print(f"{handler.__name__}, {guide_class.__name__}: variance ratio {ratio:.3f}")
    assert ratio < 0.5


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(2, vectorize_particles=False),
        ImportanceWeightedELBO(1),
        ImportanceWeightedELBO(1, gradient="dreg"),
        ImportanceWeightedELBO(1, gradient="stl"),
    ],
    ids=["Trace_ELBO", "pathwise", "dreg", "stl"],
)
def test_other_objectives_have_the_same_mean(elbo, name):
    torch.manual_seed(2)
    net = mlp()
    plain = gradients(None, TraceMeanField_ELBO(), net, MeanFieldGuide, 120)
    quiet = gradients(HANDLERS[name], elbo, net, MeanFieldGuide, 120)
    error = ((plain.var(0) + quiet.var(0)) / 120).sqrt()
    assert ((plain.mean(0) - quiet.mean(0)).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("name", HANDLERS)
def test_training_with_weighted_kl(name):
    model = Regression(mlp())
    guide = MeanFieldGuide(model.net)
    x = torch.randn(40, 3)
    y = x.sum(1)
    schedule = GeometricKL(4)
    elbo = KLWeightedELBO(TraceMeanField_ELBO(), schedule)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = []
    for step in range(80):
        rows = slice(10 * (step % 4), 10 * (step % 4) + 10)
        with HANDLERS[name]():
            losses.append(svi.step(x[rows], y[rows]))
        schedule.step()
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


@pytest.mark.parametrize("name", HANDLERS)
def test_rows_without_input_have_finite_gradients(name):
    model = Regression(nn.Linear(3, 1, bias=False))
    guide = MeanFieldGuide(model.net)
    with HANDLERS[name]():
        TraceMeanField_ELBO()(model, guide)(torch.zeros(4, 3), torch.zeros(4)).backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters())


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(self.linear(x).tanh()).sum(1)


def test_flipout_gives_an_example_the_same_weights_at_each_use():
    x = torch.randn(1, 3).expand(4, 3)
    net = Twice()
    flipped = outputs(flipout, net, x, num_draws=1000).flatten()
    torch.manual_seed(5)
    module = BayesianModule(net, NORMAL)
    guide = MeanFieldGuide(module, init_scale=0.5)
    with torch.no_grad():
        plain = torch.stack(
            [
                poutine.replay(module, trace=poutine.trace(guide).get_trace())(x[:1])
                for _ in range(1000)
            ]
        ).flatten()
    for power in (1, 2):
        a, b = flipped**power, plain**power
        error = (a.reshape(-1, 4).mean(1).var() / 1000 + b.var() / 1000).sqrt()
        assert (a.mean() - b.mean()).abs() < 4.5 * error


class TiedBias(nn.Module):
    """Two layers whose biases cancel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.first(x) - self.second(x)


class TwoShapes(nn.Module):
    """One weight for rows and for positions, which cancel."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        positions = x.unsqueeze(1).expand(-1, len(x), -1)
        return self.linear(x) - self.linear(positions).mean(1)


@pytest.mark.parametrize("net", [TiedBias(), TwoShapes()], ids=["tied bias", "two shapes"])
def test_flipout_of_shared_parameters(net):
    x = torch.zeros(4, 3) if isinstance(net, TiedBias) else torch.randn(4, 3)
    assert outputs(flipout, net, x, num_draws=5).abs().max() < 1e-5


class Chunked(nn.Module):
    """A part of a layer's weight used again."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        first, _ = self.linear.weight.chunk(2)
        return self.linear(x) - nn.functional.linear(x, first)


class Product(nn.Module):
    """One weight as the input of the layer of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) @ nn.functional.linear(self.first, weight=self.second)


class Penalised(nn.Module):
    """A layer whose weights another operation uses too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x) + self.linear.weight.square().sum()


class Flattened(nn.Module):
    """Positions that were made rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x.reshape(-1, 3)).reshape(len(x), -1).sum(1)


BATCH = (4, 3)


@pytest.mark.parametrize(
    ("name", "net", "shape", "message"),
    [
        ("local_reparameterization", SumOverPositions(), (4, 5, 2), "not one row for each example"),
        ("local_reparameterization", Twice(), BATCH, "'linear.weight' is used more than once"),
        ("local_reparameterization", nn.Conv1d(3, 2, 1), (4, 3, 2), r"supported layer \(linear\)"),
        (
            "local_reparameterization",
            Flattened(),
            (4, 2, 3),
            "with the 4 examples in the first dim",
        ),
        ("flipout", Flattened(), (4, 2, 3), r"input of shape \(8, 3\)"),
        ("flipout", nn.Conv1d(3, 1, 1), BATCH, "with the 4 examples in the first dim"),
        ("flipout", nn.LayerNorm(3), BATCH, "no latent weights in a supported layer"),
        ("flipout", nn.LSTM(3, 2), (4, 2, 3), "no latent weights in a supported"),
        ("flipout", Chunked(), BATCH, "'linear.weight' is also used outside its layer"),
        ("flipout", Product(), BATCH, "'second' .* the 4 examples in the first dim"),
        ("local_reparameterization", TiedBias(), BATCH, "'second.weight' is used more than once"),
        ("flipout", Penalised(), BATCH, "'linear.weight' is also used outside its layer"),
        ("local_reparameterization", Penalised(), BATCH, "'linear.weight' is also used"),
    ],
)
def test_layers_that_are_refused(name, net, shape, message):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        outputs(HANDLERS[name], net, torch.randn(shape), num_draws=1)


@pytest.mark.parametrize("name", HANDLERS)
def test_programs_that_are_refused(name):
    model = Regression(nn.Linear(3, 1))
    x, y = torch.randn(4, 3), torch.randn(4)
    mean_field = MeanFieldGuide(model.net)
    joint = AutoMultivariateNormal(model)
    joint(x, y)
    vectorized = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)
    looped = ImportanceWeightedELBO(3, vectorize_particles=False)
    with HANDLERS[name]():
        with pytest.raises(
            ValueError, match=r"'weight' has several draws at once, with shape \(3, 1, 1, 3"
        ):
            vectorized.loss(model, mean_field, x, y)
        with pytest.raises(ValueError, match="guide does not draw 'weight', in this run"):
            Trace_ELBO().loss(model, joint, x, y)
        with pytest.raises(ValueError, match=f"{name} requires an ELBO with num_particles=1"):
            looped.loss(model, mean_field, x, y)
        # One particle at a time is no linear objective.
        chunked = ImportanceWeightedELBO(3, particle_chunk_size=1)
        for call in (chunked.loss, chunked.loss_and_grads):
            with pytest.raises(ValueError, match=f"{name} requires an ELBO with num_particles=1"):
                call(model, mean_field, x, y)
        with pytest.raises(ValueError, match=f"{name} requires an ELBO with num_particles=1"):
            estimate_evidence(model, mean_field, x, y, chunk_size=1)
        with pytest.raises(ValueError, match=f"{name} requires an ELBO with num_particles=1"):
            estimate_evidence(model, mean_field, x, y, num_samples=10)
    Trace_ELBO().loss(model, joint, x, y)

    def chained(x, y):
        weight = pyro.sample("weight", mean_field.distributions()["weight"])
        pyro.sample("bias", dist.Normal(weight.sum(-1), 1.0).to_event(1))

    with (
        HANDLERS[name](),
        pytest.raises(ValueError, match=r"'.*bias', .* depends on no other draw"),
    ):
        Trace_ELBO().loss(model, chained, x, y)
