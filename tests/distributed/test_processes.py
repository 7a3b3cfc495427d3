import os
import signal
import time

import pytest
import torch
from torch import multiprocessing

from pyro_ext.distributed.processes import current_processes
from tests.distributed.pool import start_group

pytestmark = pytest.mark.long


def exchange():
    processes = current_processes()
    x = torch.full((2,), float(processes.rank))
    processes.copy_from_first(x)
    parts = processes.gather({"rank": processes.rank, "x": torch.ones(processes.rank)})
    return processes.add(torch.tensor([1.0, processes.rank])).tolist(), x.tolist(), parts


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_have_the_same_sum_copy_and_parts(pools, size):
    for total, copy, parts in pools(size).results(exchange):
        assert total == [size, size * (size - 1) / 2]
        assert copy == [0.0, 0.0]
        assert [part["rank"] for part in parts] == list(range(size))
        assert [part["x"].tolist() for part in parts] == [[1.0] * rank for rank in range(size)]


def share_a_failure():
    processes = current_processes()
    return processes.results_of_all(lambda: 1 // (1 - processes.rank), "estimate_nothing")


def test_an_error_of_one_process_is_an_error_of_all(pools):
    first, second = pools(2).errors(share_a_failure)
    assert "estimate_nothing: rank 1 of 2 failed with ZeroDivisionError: " in first
    assert second.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def lose_rank_1(rank, size, folder, is_killed):
    start_group(rank, size, folder, 5)
    processes = current_processes()
    if rank == 1:
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    try:
        processes.add(torch.zeros(3))
    except RuntimeError as error:
        text = str(error)
    with open(f"{folder}/{rank}.txt", "w") as file:
        file.write(text)
    os._exit(0)  # the group cannot end in order


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lost_process_is_named_by_all_others(tmp_path, is_killed):
    started = time.monotonic()
    context = multiprocessing.start_processes(
        lose_rank_1, (3, str(tmp_path), is_killed), nprocs=3, join=False
    )
    for rank in (0, 2):
        context.processes[rank].join(60)
    context.processes[1].kill()
    assert time.monotonic() - started < 60
    for rank in (0, 2):
        assert (tmp_path / f"{rank}.txt").read_text().startswith("pyro_ext: rank 1 has ended, or")
