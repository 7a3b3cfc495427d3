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
