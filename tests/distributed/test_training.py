import pyro
import pytest
import torch

from tests.distributed.training import NAMES, train

pytestmark = pytest.mark.long


def assert_equal(found, expected):
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_several_processes_take_the_steps_of_one(pools, name, is_compiled, size):
    expected = train(name, is_compiled)
    for found in pools(size).results(train, name, is_compiled):
        assert_equal(found, expected)


def test_graphs_that_inductor_compiles_are_right(pools):
    expected = train("local plate", True, backend="inductor")
    for found in pools(2).results(train, "local plate", True):
        assert_equal(found, expected)
    for found in pools(2).results(train_compiled, "local plate"):
        assert_equal(found, expected)


def train_compiled(name):
    return train(name, True, backend="inductor")


def train_locally(name):
    with pyro.settings.context(module_local_params=True):
        return train(name)[0]


@pytest.mark.parametrize("name", ["pathwise", "Bayesian module"])
def test_parameters_outside_of_the_param_store_are_trained(pools, name):
    expected = train_locally(name)
    for found in pools(2).results(train_locally, name):
        assert found == pytest.approx(expected, rel=1e-5)
