"""Misuse: each error names the site, plate or argument, and what to do."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    JackknifeELBO,
    MultiSampleELBO,
    estimate_evidence,
)

N = 4


def model(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(1.0)) * z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(pyro.param("b", torch.tensor(0.1)), 1.0))


def guide_without_z(x):
    pass


def guide_with_more(x):
    guide(x)
    pyro.sample("extra", dist.Normal(0.0, 1.0))


def guide_that_samples_the_data(x):
    guide(x)
    with pyro.plate("more", N):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def guide_in_another_plate(x):
    with pyro.plate("points", N):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def guide_of_another_size(x):
    with pyro.plate("data", N + 1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def guide_without_event_dim(x):
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


@config_enumerate
def enumerated_guide(x):
    with pyro.plate("data", N):
        pyro.sample("z", dist.Bernoulli(0.5))


def enumerated_model(x):
    model(x)
    with pyro.plate("data2", N):
        pyro.sample("k", dist.Poisson(2.0), infer={"enumerate": "parallel"})


def model_for_one_particle(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.stack([z[i] for i in range(N)])  # dim 0 is the data only if alone
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


X = torch.tensor([0.5, -0.5, 1.0, 2.0])
NAN = torch.tensor([0.5, math.nan, 1.0, 2.0])
RUNS = {
    "site missing from the guide": (model, guide_without_z, X, "'z' of the model is missing from"),
    "site missing from the model": (model, guide_with_more, X, "'extra' of the guide is missing"),
    "observed site in the guide": (model, guide_that_samples_the_data, X, "'x' is observed in the"),
    "another plate": (
        model,
        guide_in_another_plate,
        X,
        r"'z' is in the plates .* {'points': 4} in the guide, but in {'data': 4} in the model",
    ),
    "plate of another size": (model, guide_of_another_size, X, "z"),
    "event dims": (model, guide_without_event_dim, X, "at site .z"),
    "enumerated in the guide": (
        model,
        enumerated_guide,
        X,
        "'z' of the guide is marked for enumeration",
    ),
    "enumerated in the model": (enumerated_model, guide, X, "'k' is marked for enumeration"),
    "NaN in the data": (model, guide, NAN, "site 'x'"),
    "data of the wrong shape": (model, guide, torch.zeros(N + 1), "x"),
}


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize(("model", "guide", "x", "message"), RUNS.values(), ids=RUNS)
def test_runs_that_fail_change_nothing(model, guide, x, message, vectorize):
    elbo = ImportanceWeightedELBO(3, vectorize_particles=vectorize)
    w = pyro.param("w", torch.tensor(1.5))
    w.grad = torch.tensor(7.0)
    optimizer = pyro.optim.Adam({"lr": 0.1})
    for call in (
        lambda: SVI(model, guide, optimizer, elbo).step(x),
        lambda: elbo.loss(model, guide, x),
        lambda: elbo.loss_and_grads(model, guide, x),
        lambda: elbo.differentiable_loss(model, guide, x),
        lambda: estimate_evidence(model, guide, x, num_samples=5),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "extra dim" not in str(raised.value)  # which is not what is wrong
    assert w.item() == 1.5
    assert w.grad.item() == 7.0
    assert not optimizer.optim_objs


def test_nan_is_found_without_validation_too():
    with pyro.validation_enabled(False):
        for elbo in (ImportanceWeightedELBO(3), ImportanceWeightedELBO(1), JackknifeELBO(3)):
            for call in (elbo.loss, elbo.loss_and_grads):
                with pytest.raises(
                    ValueError, match=r"loss is nan\. .* site 'x' of the model is NaN"
                ):
                    call(model, guide, NAN)
        with pytest.raises(
            ValueError, match=r"log weight for data points \[1\] \(of 4\) is nan\. .* site 'x' of"
        ):
            estimate_evidence(model, guide, NAN)
    assert pyro.param("w").grad is None


def test_zero_weights_have_a_loss_but_no_gradient():
    def impossible(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("never", torch.where(torch.arange(N) == 1, -math.inf, 0.0) + 0 * z)

    elbo = ImportanceWeightedELBO(3)
    assert elbo.loss(impossible, guide, X) == math.inf
    with pytest.raises(
        ValueError, match=r"loss is inf\. .* 'never' of the model is infinite in too"
    ):
        elbo.loss_and_grads(impossible, guide, X)
    with pytest.raises(ValueError, match=r"JackknifeELBO: the loss is nan\. .* 'never'"):
        JackknifeELBO(3).loss(impossible, guide, X)
    assert pyro.param("b").grad is None


def test_a_model_that_cannot_take_the_extra_dim_is_told_the_way_out():
    elbo = ImportanceWeightedELBO(3)
    message = (
        r"(?s)model failed after its site 'z' .* pyro_ext.nn.LeadingDims.* vectorize_particles=F"
    )
    with pytest.raises(ValueError, match=message):
        elbo.loss(model_for_one_particle, guide, X)
    looped = ImportanceWeightedELBO(3, vectorize_particles=False)
    assert math.isfinite(looped.loss(model_for_one_particle, guide, X))


def test_the_error_names_the_guide_where_the_guide_fails():
    flatten = nn.Sequential(nn.Flatten(0), nn.Linear(N, 1))

    def guide_that_flattens(x):
        with pyro.plate("data", N):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(flatten(a), 1.0))

    def with_a(x):
        with pyro.plate("data", N):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(a, 1.0))

    with pytest.raises(ValueError, match="The guide failed after its site 'a'"):
        ImportanceWeightedELBO(3).loss(with_a, guide_that_flattens, X)


def test_running_out_of_memory_stays_what_it_is():
    def hungry(x):
        with pyro.plate("data", N):
            if pyro.sample("z", dist.Normal(0.0, 1.0)).dim() > 1:
                raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError):
        ImportanceWeightedELBO(3).loss(hungry, guide, X)


@pytest.mark.parametrize("K", [3, 5])
def test_a_batch_dim_without_a_plate_is_not_taken_for_the_particles(K):
    def unplated(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:3])

    def unplated_guide(x):
        pyro.sample("z", dist.Normal(x[:3], 1.0))

    elbo = ImportanceWeightedELBO(K, max_plate_nesting=0)
    with pytest.raises(ValueError, match=r"Site 'z' has batch shape \(3,\)"):
        elbo.loss(unplated, unplated_guide, X)


@pytest.mark.parametrize(
    ("bound", "found"),
    [
        (lambda log_w: log_w.mean(1), r"a tensor of shape \(3,\)"),
        (lambda log_w: log_w.sum(), r"a tensor of shape \(\)"),
        (lambda log_w: 1.0, r"1\.0"),
    ],
)
def test_a_bound_of_the_wrong_shape(bound, found):
    class Wrong(MultiSampleELBO):
        def bound(self, log_w):
            return bound(log_w)

    for call in (Wrong(3).loss, Wrong(3).loss_and_grads):
        with pytest.raises(ValueError, match=rf"Wrong.bound must .* \(4,\) .* returned {found}"):
            call(model, guide, X)


CONSTRUCTORS = {
    "no particles": (
        lambda: ImportanceWeightedELBO(0),
        "num_particles must be at least 1, but it is 0",
    ),
    "unknown gradient": (
        lambda: ImportanceWeightedELBO(gradient="score"),
        r"gradient must be one of \['dreg', 'pathwise', 'stl'\], but it is 'score'",
    ),
    "order = K": (lambda: JackknifeELBO(2, 2), "order=2 with num_particles=2"),
    "one particle, order 1": (lambda: JackknifeELBO(1), "order=1 with num_particles=1"),
    "negative order": (lambda: JackknifeELBO(2, -1), "order must be at least 0, but it is -1"),
    "no draws": (
        lambda: estimate_evidence(model, guide, X, num_samples=0),
        "num_samples must be",
    ),
    "empty chunks": (
        lambda: estimate_evidence(model, guide, X, chunk_size=0),
        "chunk_size must be",
    ),
    "order of the evidence": (
        lambda: estimate_evidence(model, guide, X, num_samples=2, jackknife_orders=(2,)),
        r"jackknife_orders must be below the number of draws, 2, but it is 2",
    ),
}


@pytest.mark.parametrize(("call", "message"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


WRONG_TYPES = {
    "half a particle": (lambda: ImportanceWeightedELBO(1.5), "num_particles .* but it is 1.5"),
    "bool for a number": (lambda: ImportanceWeightedELBO(True), "num_particles .* but it is True"),
    "bool for an order": (lambda: JackknifeELBO(3, True), "order must be an integer >= 0, .* True"),
    "no nesting": (lambda: ImportanceWeightedELBO(max_plate_nesting=None), "max_plate_nesting"),
    "a number for a plate": (lambda: ImportanceWeightedELBO(local_plate=3), "local_plate .* is 3"),
    "text for draws": (lambda: estimate_evidence(model, guide, X, num_samples="9"), "is '9'"),
    "one order": (
        lambda: estimate_evidence(model, guide, X, jackknife_orders=1),
        "jackknife_orders must be .* but it is 1",
    ),
    "no guide": (lambda: ImportanceWeightedELBO().loss(model, None, X), "the guide is None"),
    "a long tensor for a guide": (
        lambda: ImportanceWeightedELBO().loss(model, torch.zeros(3000)),
        r"ImportanceWeightedELBO: the guide is a tensor of shape \(3000,\)\. Pass",
    ),
    "a list for a guide": (
        lambda: estimate_evidence(model, [0.0] * 3000),
        r"estimate_evidence: the guide is a list of length 3000\. Pass a guide",
    ),
    "a class for a guide": (
        lambda: estimate_evidence(model, AutoNormal, X),
        r"the guide is the class AutoNormal\. Pass an instance of it, such as AutoNormal\(model\)",
    ),
    "an SVI for a guide": (
        lambda: estimate_evidence(
            model, SVI(model, guide, pyro.optim.Adam({}), ImportanceWeightedELBO()), X
        ),
        r"the guide is an SVI\. Pass its guide, svi\.guide",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_arguments_of_the_wrong_type(call, message):
    with pytest.raises(TypeError, match=message) as raised:
        call()
    assert len(str(raised.value)) < 300
