"""Marked sites that cannot be summed out are errors that name the site and the plate."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ext.infer import ImportanceWeightedELBO
from tests.tracing.enumerated import X


def bad(kind):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        marked = {"enumerate": "parallel"}
        if kind == "infinite":
            count = pyro.sample("count", dist.Poisson(3.0), infer=marked)
            pyro.sample("x", dist.Normal(mean + count, 1.0), obs=x[0])
        elif kind == "sequential":
            a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
            pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "drawn":
            infer = {**marked, "num_samples": 4}
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=infer)
            pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "subsampled":
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=marked)
            with pyro.plate("data", 5, subsample=torch.tensor([0, 1])):
                pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[:2])
        elif kind == "scale":
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=marked)
            with poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "dims":
            for i in range(70):
                a = pyro.sample(f"a_{i}", dist.Bernoulli(0.5), infer=marked)
                pyro.sample(f"x_{i}", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "mask":
            with pyro.plate("chains", 5):
                with poutine.mask(mask=torch.arange(5) < 2):
                    a = pyro.sample("a", dist.Bernoulli(0.5), infer=marked)
                b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a), infer=marked)
                pyro.sample("x", dist.Normal(mean + b, 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("infinite", "Site 'count' is marked for enumeration, but Poisson has no support"),
        ("sequential", "Site 'a' is marked for sequential enumeration"),
        ("drawn", "Site 'a' is marked for enumeration with num_samples="),
        ("subsampled", r"Sites 'a' and 'x' .* different scales: 1 and 2.5 \(plate 'data'\)"),
        ("scale", "Sites 'a' and 'x' are summed out together, but have different scales: 1 and 2"),
        ("dims", r"Site 'a_\d+' is enumerated along dim -65, but tensors have at most 64 dims"),
        ("mask", "A mask hides site 'a' where it does not hide site 'b', .* in plate 'chains'"),
    ],
)
def test_sums_that_are_not_possible_are_errors(kind, message):
    def guide(x):
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    for K in (1, 3):
        with pytest.raises(ValueError, match=message):
            ImportanceWeightedELBO(K).loss(bad(kind), guide, X.float())
