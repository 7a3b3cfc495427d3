"""Tensors and floats that a graph reads are those of now."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import ImportanceWeightedELBO, VariationalRenyiELBO
from tests.infer.svi.normal_programs import eager_loss, normal_guide, normal_model, still
from tests.infer.svi.programs import PROBLEMS, SmallVAE, images, vae


def test_parameters_and_tensors_are_those_of_now():
    module = SmallVAE()
    svi = still(module.model, module.guide, ImportanceWeightedELBO(3))
    x = images()
    svi.step(x)

    def assert_seen():
        expected = eager_loss(svi, x)
        assert svi.step(x) == pytest.approx(expected, rel=1e-6)

    module.load_state_dict(SmallVAE().state_dict())
    assert_seen()
    with torch.no_grad():
        module.decoder[0].bias.add_(1.0)
    assert_seen()
    module.decoder[2].weight.data = torch.randn(12, 8)
    assert_seen()
    assert svi._graphs.count == 1


def test_edits_of_the_param_store_are_seen():
    svi = still(normal_model, normal_guide, ImportanceWeightedELBO(3))
    x = torch.tensor(2.0)
    svi.step(x)
    pyro.get_param_store()["loc"] = torch.tensor(-4.0)
    expected = eager_loss(svi, x)
    assert svi.step(x) == pytest.approx(expected, rel=1e-6)
    assert svi._graphs.count == 1


def test_minibatch_indices_are_fresh():
    rows_seen = []
    problem = PROBLEMS["subsampled plate, locals"]()
    svi = still(problem.model, problem.guide, problem.loss)
    svi.step(*problem.args)
    svi._optimizer.step = lambda params, _: rows_seen.append(
        tuple(params[0].grad.nonzero().flatten().tolist())
    )
    for _ in range(5):
        svi.step(*problem.args)
    assert len(set(rows_seen)) == 5
    assert all(len(rows) == 7 for rows in rows_seen)


def test_a_smaller_last_batch_gets_a_graph():
    problem = vae()
    svi = still(problem.model, problem.guide, problem.loss)
    for batch_size in (10, 4, 10, 4):
        expected = eager_loss(svi, images(batch_size))
        assert svi.step(images(batch_size)) == pytest.approx(expected, rel=1e-5)
    assert svi._graphs.count == 2


@pytest.mark.long
def test_float64_and_changes_of_dtype():
    module = SmallVAE().double()
    svi = still(module.model, module.guide, ImportanceWeightedELBO(3))
    x = images().double()
    svi.step(x)
    expected = eager_loss(svi, x)
    assert svi.step(x) == pytest.approx(expected, rel=1e-12)
    module.float()
    expected = eager_loss(svi, x.float())
    assert svi.step(x.float()) == pytest.approx(expected, rel=1e-5)
    assert svi._graphs.count == 2


@pytest.mark.long
def test_numbers_of_the_objective_are_inputs():
    svi = still(normal_model, normal_guide, VariationalRenyiELBO(0.3, 5))
    x = torch.tensor(2.0)
    for alpha in (0.3, 0.5, 0.9, 0.0):
        svi.objective.alpha = alpha
        expected = eager_loss(svi, x)
        assert svi.step(x) == pytest.approx(expected, rel=1e-6)
    assert svi._graphs.count == 1
    assert svi.objective.alpha == 0.0
    assert type(svi.objective.alpha) is float


def test_numbers_among_the_arguments_are_inputs():
    def model(x, scale, more):
        with pyro.poutine.scale(scale=more["weight"]):
            normal_model(x / scale)

    svi = still(model, lambda x, *args, **kwargs: normal_guide(x), ImportanceWeightedELBO(5))
    for scale in (1.0, 2.0, 3.0):
        args = torch.tensor(2.0), scale
        more = {"weight": scale / 4}
        expected = eager_loss(svi, *args, more=more)
        assert svi.step(*args, more=more) == pytest.approx(expected, rel=1e-6)
    assert svi._graphs.count == 1


def test_numbers_that_are_branched_on_get_graphs_of_their_own():
    def model(x, scale):
        normal_model(x if scale > 1.5 else -x)

    svi = still(model, lambda x, scale: normal_guide(x), ImportanceWeightedELBO(5))
    for scale in (1.0, 2.0, 1.0, 2.0):
        expected = eager_loss(svi, torch.tensor(2.0), scale)
        assert svi.step(torch.tensor(2.0), scale) == pytest.approx(expected, rel=1e-6)
    assert svi._graphs.count == 2


@pytest.mark.long
def test_numbers_keep_their_dtype_and_python_its_types():
    table = {0.5: 1.0, 1.5: 3.0}

    def by_table(x, scale):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), table[scale]), obs=x)

    def by_tensor(x, scale):
        scales = torch.tensor([scale, 1.0])
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), scales.sum()), obs=x)

    for model in (by_table, by_tensor):
        pyro.clear_param_store()
        svi = still(model, lambda x, scale: normal_guide(x), ImportanceWeightedELBO(5))
        for scale in (0.5, 1.5, 0.5, 1.5):
            expected = eager_loss(svi, torch.tensor(2.0), scale)
            assert svi.step(torch.tensor(2.0), scale) == pytest.approx(expected, rel=1e-6)
