"""What a comparison of models refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.diagnostics import compare_models
from pyro_ext.infer import estimate_evidence
from tests.models import GlobalNormal, NormalNormal

X = torch.linspace(-1.5, 2.5, 12, dtype=torch.float64)


def observing(x, site="x", plate="data", mask=True):
    def model():
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate(plate, len(x)), pyro.poutine.mask(mask=mask):
            pyro.sample(site, dist.Normal(z, 1.0), obs=x)

    return model


def short(length):
    return X[:length]


OTHER_DATA = {
    "sites": (
        {"one": observing(X), "two": observing(X, "y")},
        r"model 'one' observes the sites \['x'\], but model 'two' observes \['y'\]",
    ),
    "shapes": (
        {"one": observing(X), "two": observing(short(7))},
        r"site 'x' has 12 values in model 'one' \(shape \(12,\)\), but 7 in model 'two' "
        r"\(shape \(7,\)\)",
    ),
    "masks": (
        {"one": observing(X), "two": observing(X, mask=X > 0)},
        r"12 values in model 'one'.*but 7 in model 'two'.*Masked values do not count",
    ),
    "values": (
        {"one": observing(X), "two": observing(X / 2)},
        "site 'x' has other values in model 'two' than in model 'one'",
    ),
    "shifted": ({"one": observing(X + 9), "two": observing(9 - X)}, "has other values"),
    "third": ({"a": observing(X), "b": observing(X), "c": observing(X, "y")}, "'b'.*'c'"),
}


@pytest.mark.parametrize(("models", "message"), OTHER_DATA.values(), ids=OTHER_DATA)
def test_refuses_models_of_other_data(models, message):
    with pytest.raises(ValueError, match=f"compare_models: .*{message}"):
        compare_models(models)


@pytest.mark.parametrize(
    "other",
    [observing(X, plate="rows"), observing(X.float()), observing(X.flip(0))],
    ids=["plate", "float32", "order"],
)
def test_takes_the_same_data_in_another_form(other):
    compare_models({"one": observing(X), "two": other}, num_samples=10)


def test_dims_may_lie_in_another_order():
    x = torch.stack([X, 2 * X], 1)

    def events():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("rows", 12):
            fn = dist.Normal(z.unsqueeze(-1), X.new_ones(2)).to_event(1)
            pyro.sample("x", fn, obs=x)

    def plates():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", 12, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    found = compare_models({"events": events, "plates": plates}, num_samples=10)
    assert len(found) == 2


def test_checks_the_plates_of_evidences():
    def evidence(x):
        return estimate_evidence(NormalNormal(x).model, None, num_samples=10)

    message = r"plate 'data' has 7 data points in model 'one', but 12 in model 'two'"
    with pytest.raises(ValueError, match=message):
        compare_models({"one": evidence(short(7)), "two": evidence(X)})
    with pytest.raises(ValueError, match="has 12 data points in model 'two', but 7"):
        compare_models({"two": observing(X), "one": evidence(short(7))})
    compare_models({"one": evidence(X), "two": observing(X)}, num_samples=10)


def test_refuses_a_minibatch():
    programs = NormalNormal(X, subsample_size=4)
    message = r"model 'a' subsamples plate 'data' \(4 of 12 rows\).*'batch_size': 4"
    with pytest.raises(ValueError, match=message):
        compare_models({"a": (programs.model, programs.guide)})


def test_errors_name_the_model():
    broken = GlobalNormal(X)
    with pytest.raises(TypeError, match="missing 1 required") as caught:
        compare_models({"good": broken.model, "broken": lambda x: None})
    assert caught.value.__notes__ == ["compare_models: this happened for model 'broken'."]


ERRORS = {
    "no dict": ([1], {}, TypeError, "models must be a dict from names to models"),
    "empty": ({}, {}, ValueError, "models is empty"),
    "number": ({"a": 3}, {}, TypeError, "model 'a' must be an SVI, a pair.*but it is 3"),
    "guide": ({"a": (observing(X), 3)}, {}, TypeError, "model 'a': the guide is 3"),
    "class": ({"a": GlobalNormal}, {}, TypeError, "model 'a': the model is the class GlobalNormal"),
    "interval": ({"a": observing(X)}, {"interval": 2}, ValueError, "interval must be between"),
    "scopes": ({"a": observing(X)}, {"scopes": {"b": {}}}, ValueError, r"scopes has \['b'\]"),
    "loader": (
        {"a": observing(X)},
        {"evidence_kwargs": {"data_loader": []}},
        ValueError,
        "evidence_kwargs has 'data_loader'.*pass the results",
    ),
    "prior names": (
        {"a": observing(X)},
        {"prior_probabilities": {"b": 1.0}},
        ValueError,
        r"prior_probabilities must have the names of the models, but \['a', 'b'\]",
    ),
    "prior sum": (
        {"a": observing(X), "b": observing(X)},
        {"prior_probabilities": {"a": 0.5, "b": 0.4}},
        ValueError,
        "must sum to 1, but their sum is 0.9",
    ),
    "negative prior": (
        {"a": observing(X), "b": observing(X)},
        {"prior_probabilities": {"a": 1.5, "b": -0.5}},
        ValueError,
        "the prior probability of model 'a' must be between 0 and 1, but it is 1.5",
    ),
    "prior type": (
        {"a": observing(X)},
        {"prior_probabilities": [1.0]},
        TypeError,
        "prior_probabilities must be a dict",
    ),
}


@pytest.mark.parametrize(("models", "options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_refuses_wrong_arguments(models, options, error, message):
    with pytest.raises(error, match=f"compare_models: .*{message}"):
        compare_models(models, **options)
