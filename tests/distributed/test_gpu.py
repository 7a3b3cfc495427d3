"""Processes that exchange tensors of a GPU."""

import pytest
import torch
from torch import distributed

from pyro_ext.distributed.processes import Processes
from tests.distributed.test_training import assert_equal
from tests.distributed.training import NAMES, train

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_on_one_gpu_take_the_steps_of_one(pools, name, is_compiled):
    expected = train(name, is_compiled, "cuda")
    for found in pools(2).results(train, name, is_compiled, "cuda"):
        assert_equal(found, expected)


def test_nccl_exchanges_tensors_of_both_devices(tmp_path):
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        processes = Processes(0, 1)
        for device in ("cpu", "cuda"):
            x = torch.tensor([1.0, 2.0], device=device)
            assert processes.add(x.clone()).tolist() == [1.0, 2.0]
            assert processes.add(x).device == x.device
            processes.copy_from_first(x)
            (found,) = processes.gather({"x": x})
            assert torch.equal(found["x"], x)
            assert processes.result_of_first(lambda: 3, "a test") == 3
    finally:
        distributed.destroy_process_group()
