"""CompiledSVI takes eager steps, with one warning, where there is no graph."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI
from tests.infer.svi.capture.programs import X, assert_follows, guide, observe, still, take_steps
from tests.infer.svi.programs import images, vae


def test_arguments_that_are_objects_are_known_by_identity():
    class Batch:
        def __init__(self, x):
            self.x = x

    def model(batch):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), batch.x)

    svi = still(model, max_graphs=2)
    batch = Batch(X)
    assert_follows(svi, batch)
    batch.x = X + 1
    assert_follows(svi, batch)
    assert svi._graphs.count == 1
    assert_follows(svi, Batch(X + 2))
    with pytest.warns(
        UserWarning, match=r"max_graphs=2 graphs, and now args\[0\] has another value than"
    ):
        assert_follows(svi, Batch(X + 3))


@pytest.mark.long
def test_shapes_that_change_at_each_step_end_in_eager_steps():
    problem = vae()
    svi = CompiledSVI(
        *problem[:2], pyro.optim.SGD({"lr": 0.0}), problem.loss, backend="eager", max_graphs=3
    )
    problem.loss.max_plate_nesting = 1
    with pytest.warns(
        UserWarning, match=r"max_graphs=3 graphs, and now args\[0\] has another shape"
    ) as record:
        take_steps(svi, [images(batch_size) for batch_size in range(2, 10)])
    assert len(record) == 1
    assert svi._graphs.count == 3
    assert_follows(svi, images(2))  # still has its graph


def test_late_parameters_end_in_eager_steps():
    def late_guide(x):
        guide(x)
        if "begin" in pyro.get_param_store():
            pyro.param("late", torch.tensor(0.0))

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = still(model, late_guide)
    for _ in range(10):
        svi.step(X)
    pyro.param("begin", torch.tensor(0.0))
    with pytest.warns(UserWarning, match="an audit at step .* parameter 'late' is used in only"):
        take_steps(svi, [X] * 10)
    assert "late" in pyro.get_param_store()


def test_hooks_on_gradients_end_in_eager_steps():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = still(model)
    svi.step(X)
    norms = []
    pyro.param("loc").unconstrained().register_hook(lambda grad: norms.append(grad.norm().item()))
    with pytest.warns(UserWarning, match="the hook on the gradient"):
        svi.step(X)
    svi.step(X)
    assert len(norms) == 2


def test_arguments_that_require_gradients_end_in_eager_steps():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = still(model, lambda x: guide(x))
    with pytest.warns(UserWarning, match="an argument requires gradients"):
        svi.step(X.clone().requires_grad_())


def test_sparse_gradients_and_arguments_end_in_eager_steps():
    embedding = nn.Embedding(5, 2, sparse=True)

    def model(x):
        pyro.module("embedding", embedding)
        loc = embedding(torch.tensor([0, 3])).sum()
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x.sum())

    svi = CompiledSVI(
        model, lambda x: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO(), backend="eager"
    )
    with pytest.warns(UserWarning, match=r"the gradient of 'embedding\$\$\$weight' is sparse"):
        svi.step(torch.ones(2))
    with pytest.warns(UserWarning, match="an argument is a sparse tensor"):
        svi.step(torch.ones(2).to_sparse())
    svi.step(torch.ones(2).to_sparse())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_errors_that_the_programs_handle_end_in_eager_steps():
    def retry(x):
        covariance = x.sum() * torch.eye(2)
        try:
            factor = torch.linalg.cholesky(covariance)
        except RuntimeError:
            factor = torch.linalg.cholesky(covariance + 100 * torch.eye(2))
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x * factor.sum())

    svi = still(retry)
    for i in range(12):
        assert_follows(svi, X - 5 if i < 5 else X + i)

    def branch(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        try:
            scale = 2.0 if z.min() > -100 else 1.0
        except Exception:
            scale = 2.0
        observe(z, x * scale)

    svi = still(branch)
    svi.step(X)
    assert svi._graphs.count == 0
    assert any("handles this error" in event for _, event in svi.capture_report().events)


def test_arguments_may_have_nan():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x.nan_to_num())

    svi = still(model, fallback=False)
    for i in range(4):
        assert_follows(svi, torch.where(X > 1, torch.nan, X + i))
