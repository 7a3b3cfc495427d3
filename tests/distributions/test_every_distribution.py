"""What every distribution of the registry does."""

import copy
import itertools
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.infer import SVI, Trace_ELBO

from pyro_ext.infer import ImportanceWeightedELBO
from tests.registry import DISTRIBUTIONS
from tests.statistics import assert_mean

EVERY = pytest.mark.parametrize("name", DISTRIBUTIONS)
BATCH_SHAPES = pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
F64 = {"dtype": torch.float64}


def make(name, batch_shape=(), **options):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    return cls(**parameters(batch_shape, **options), **fixed)


def all_values(d):
    """Every value of a discrete distribution, along a first dim, for an empty batch shape."""
    low, high = d.low, d.high
    values = itertools.product(range(low, high + 1), repeat=max(1, d.event_shape.numel()))
    return torch.tensor(list(values), dtype=d.loc.dtype).reshape(-1, *d.event_shape)


def chi_square_probability(counts, expected):
    """The probability of a larger chi-square, cells that expect few put together."""
    is_large = expected >= 10
    counts, expected = (
        torch.cat([x[is_large], x[~is_large].sum(0, keepdim=True)]).double()
        for x in (counts, expected)
    )
    statistic = ((counts - expected).square() / expected).nan_to_num().sum()
    num_free = int((expected > 0).sum()) - 1
    return torch.special.gammaincc(torch.tensor(num_free / 2, **F64), statistic / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 4)], ids=str)
@BATCH_SHAPES
@EVERY
def test_shapes_dtype_and_support(name, batch_shape, sample_shape, dtype, device):
    d = make(name, batch_shape, dtype=dtype, device=device)
    assert d.batch_shape == batch_shape
    values = d.sample(sample_shape)
    assert values.shape == sample_shape + batch_shape + d.event_shape
    log_prob = d.log_prob(values)
    assert log_prob.shape == sample_shape + batch_shape
    assert values.dtype == log_prob.dtype == dtype
    assert values.device.type == log_prob.device.type == device.type
    assert d.support.check(values).all()
    assert not values.requires_grad
    assert f"{type(d).__name__}(" in repr(d)


@BATCH_SHAPES
@EVERY
def test_expand_equals_its_parts(name, batch_shape):
    d = make(name, batch_shape)
    wide = d.expand((5, *batch_shape))
    assert type(wide) is type(d)
    assert wide.batch_shape == (5, *batch_shape)
    assert wide.event_shape == d.event_shape
    values = wide.sample()
    torch.testing.assert_close(wide.log_prob(values), d.log_prob(values))
    again = wide.expand((2, 5, *batch_shape))
    torch.testing.assert_close(
        again.log_prob(values), d.log_prob(values).expand(2, -1, *batch_shape)
    )


@EVERY
def test_parameters_broadcast(name):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    small, large = parameters(()), parameters((3, 2))
    for wide in small:
        d = cls(**{**small, wide: large[wide]}, **fixed)
        assert d.batch_shape == (3, 2)
        values = d.sample()
        log_prob = d.log_prob(values)
        for i, j in itertools.product(range(3), range(2)):
            one = cls(**{**small, wide: large[wide][i, j]}, **fixed)
            torch.testing.assert_close(log_prob[i, j], one.log_prob(values[i, j]))


@EVERY
def test_gradients_of_the_log_density(name):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    given = {key: x.requires_grad_() for key, x in parameters((2, 3), **F64).items()}
    values = make(name, (2, 3), **F64).sample((4,))

    def log_prob(*tensors):
        return cls(**dict(zip(given, tensors, strict=True)), **fixed).log_prob(values)

    assert torch.autograd.gradcheck(log_prob, tuple(given.values()))


@EVERY
def test_pickle_and_deepcopy(name):
    d = make(name, (3,))
    values = d.sample((2,))
    for other in (pickle.loads(pickle.dumps(d)), copy.deepcopy(d)):
        torch.testing.assert_close(other.log_prob(values), d.log_prob(values))
        assert repr(other) == repr(d)


@EVERY
def test_half_precision_has_log_densities_of_at_least_float32(name):
    d = make(name, (2,), dtype=torch.bfloat16)
    assert d.log_prob(d.sample()).dtype == torch.float32


@EVERY
def test_sampler_goodness_of_fit(name):
    d = make(name, **F64)
    values = d.sample((100_000,))
    if d.support.is_discrete:
        support = all_values(d)
        masses = d.log_prob(support).exp()
        base = d.high - d.low + 1
        index = torch.zeros(len(values), dtype=torch.long)
        for digit in (values - d.low).long().reshape(len(values), -1).unbind(-1):
            index = index * base + digit
        counts = index.bincount(minlength=len(support))
        assert chi_square_probability(counts, len(values) * masses) > 1e-4
    else:
        assert auto_goodness_of_fit(values, d.log_prob(values).exp()) > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@EVERY
def test_total_mass_is_one(name, dtype, tolerance):
    d = make(name, dtype=dtype)
    if d.support.is_discrete:
        total = d.log_prob(all_values(d)).exp().sum()
    else:
        grid = torch.linspace(-40, 40, 80_001, **F64).to(dtype)
        total = d.log_prob(grid).double().exp().sum() * 1e-3
    assert total.item() == pytest.approx(1.0, abs=tolerance)


@EVERY
def test_wrappers_and_vectorized_particles(name):
    """As prior, as likelihood where discrete, in plates, masked, with several particles."""
    cls, parameters, fixed = DISTRIBUTIONS[name]
    d = make(name, (3,))
    values = d.sample()
    assert d.to_event(1).log_prob(values).shape == ()
    torch.testing.assert_close(d.to_event(1).log_prob(values), d.log_prob(values).sum())
    mask = torch.tensor([True, False, True])
    assert (d.mask(mask).log_prob(values) == d.log_prob(values) * mask).all()

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            given = parameters((3,))
            location = next(iter(given))
            shift = z.reshape(z.shape + (1,) * (given[location].dim() - 1))
            given[location] = given[location] * shift.exp()
            pyro.sample("x", cls(**given, **fixed), obs=values)

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 1.0))

    for vectorize in (True, False):
        elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert torch.tensor(svi.step()).isfinite()
    elbo.check(model, guide)
    ImportanceWeightedELBO(4).check(model, guide)


@EVERY
def test_latent_with_itself_as_guide(name):
    """The same in model and guide: the loss is zero, and so are its gradients on average."""
    cls, parameters, fixed = DISTRIBUTIONS[name]

    def program(given):
        with pyro.plate("data", 2), poutine.scale(scale=0.5):
            pyro.sample("z", cls(**given, **fixed))

    def guide():
        program({key: pyro.param(key, x) for key, x in parameters((2,)).items()})

    elbos = Trace_ELBO(), ImportanceWeightedELBO(3)
    for elbo in elbos:
        assert elbo.loss_and_grads(lambda: program(parameters((2,))), guide) == pytest.approx(0)


@EVERY
def test_empty_batches_and_draws(name):
    d = make(name, (0,))
    values = d.sample((2,))
    assert values.shape == (2, 0, *d.event_shape)
    assert d.log_prob(values).shape == (2, 0)
    assert make(name, (3,)).sample((0,)).shape == (0, 3, *d.event_shape)


@EVERY
def test_moments_of_a_lone_one(name):
    d = make(name, **F64)
    if name == "rgb-discretized-logistic-mixture":
        pytest.skip("has none")
    draws = d.sample((50_000,))
    assert_mean(draws, d.mean)
    assert_mean((draws - d.mean).square(), d.variance)


@EVERY
def test_gradients_outside_of_vmap(name):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    given = {key: x.requires_grad_() for key, x in parameters((3,), **F64).items()}
    values = make(name, (3,), **F64).sample()

    def log_prob(value, *tensors):
        options = {**fixed, "validate_args": False}
        return cls(**dict(zip(given, tensors, strict=True)), **options).log_prob(value)

    plain = torch.autograd.grad(log_prob(values, *given.values()).sum(), list(given.values()))
    batched = torch.func.vmap(log_prob)(values, *given.values())
    for one, other in zip(
        torch.autograd.grad(batched.sum(), list(given.values())), plain, strict=True
    ):
        torch.testing.assert_close(one, other)
    jacobian = torch.autograd.functional.jacobian(
        lambda *tensors: log_prob(values, *tensors), tuple(given.values()), vectorize=True
    )
    for one, other in zip(jacobian, plain, strict=True):
        torch.testing.assert_close(one.sum(0), other)


@EVERY
def test_traced_by_jit(name):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    given = parameters((3,))
    values = make(name, (3,)).sample()

    def log_prob(*tensors):
        options = {**fixed, "validate_args": False}
        return cls(**dict(zip(given, tensors, strict=True)), **options).log_prob(values)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer and its deprecation
        traced = torch.jit.trace(log_prob, tuple(given.values()), check_trace=False)
    other = [x.flip(0) for x in given.values()]
    torch.testing.assert_close(traced(*other), log_prob(*other))


@EVERY
def test_validation_can_be_turned_off(name):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    given = parameters((2,))
    d = cls(**given, **fixed, validate_args=False)
    nan = torch.full((2, *d.event_shape), float("nan"))
    assert d.log_prob(nan).isnan().all()
    assert d.expand((3, 2)).log_prob(nan).isnan().all()
    strict = cls(**given, **fixed, validate_args=True)
    for one in (strict, strict.expand((3, 2))):
        with pytest.raises(ValueError, match=r"nan|support"):
            one.log_prob(nan)


def alternatives(name):
    """The parameters in each of their spellings."""
    _, parameters, _ = DISTRIBUTIONS[name]

    def spell(shape, old, new):
        return {new if key == old else key: x.exp() for key, x in parameters(shape).items()}

    spellings = [parameters, lambda shape: spell(shape, "log_scale", "scale")]
    if name == "normal-scale-mixture":
        spellings[1] = lambda shape: spell(shape, "logits", "probs")
    if name == "rgb-discretized-logistic-mixture":
        spellings.append(lambda shape: {**parameters(shape), "coeffs": None})
    return spellings


@BATCH_SHAPES
@EVERY
def test_shapes_are_inferred_from_those_of_the_arguments(name, batch_shape):
    cls, _, fixed = DISTRIBUTIONS[name]
    for spelling in alternatives(name):
        small, large = spelling(()), spelling(batch_shape)
        for wide in [*small, None]:
            given = {**large, **fixed} if wide is None else {**small, wide: large[wide], **fixed}
            shapes = {key: getattr(x, "shape", ()) for key, x in given.items()}
            d = cls(**given)
            assert cls.infer_shapes(**shapes) == (d.batch_shape, d.event_shape)
            assert all(type(shape) is torch.Size for shape in cls.infer_shapes(**shapes))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@EVERY
def test_parameters_that_are_not_finite_are_refused(name, bad):
    """Except for log weights of minus infinity, unless all are."""
    cls, _, fixed = DISTRIBUTIONS[name]
    for spelling in alternatives(name):
        for key, x in spelling((2,)).items():
            if x is None:
                continue
            is_weight = key == "logits" and bad == float("-inf")
            index = (0, slice(None)) if is_weight else (0, *(0 for _ in x.shape[1:]))
            wrong = x.clone()
            wrong[index] = bad
            given = {**spelling((2,)), key: wrong}
            with pytest.raises(ValueError, match=f"parameter {key} "):
                cls(**given, **fixed)
            if is_weight:
                wrong[0, 0] = 0.0
                assert cls(**given, **fixed).log_prob(make(name).sample()).isfinite().all()
