"""The messages of a training step."""

import pyro
import pytest

pytest.importorskip("matplotlib")
from benchmarks.several_processes import counted_bytes, expected_bytes
from pyro_ext.distributed.processes import current_processes
from tests.distributed.training import NAMES, make, rows

pytestmark = pytest.mark.long


def messages(name, is_compiled):
    svi = make(name, is_compiled)
    x = rows()[current_processes().rank :: 2][:4]
    for _ in range(3):
        svi.step(x)
    with counted_bytes() as found:
        svi.step(x)
    return found, expected_bytes([x.numel() for x in pyro.get_param_store().values()])


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_sends_one_message_with_all_gradients(pools, name, is_compiled):
    for found, expected in pools(2).results(messages, name, is_compiled):
        assert found == [expected]
