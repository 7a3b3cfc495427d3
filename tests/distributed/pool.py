"""A pool of processes with a gloo group, in which tests run functions."""

import gc
import os
import tempfile
import traceback
import warnings
from datetime import timedelta

import pyro
import pytest
import torch
from torch import distributed, multiprocessing

#: The numbers of processes of tests that are run for both with ``--slow``.
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


def objectives(names):
    """The names of objectives as parameters of a test. Those that others cover are slow."""
    slow = {"pathwise", "jackknife"}
    return [pytest.param(x, marks=pytest.mark.slow if x in slow else ()) for x in names]


class Pool:
    """Processes that wait for functions, so that a session starts them only once."""

    def __init__(self, size):
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = rank, size, self._folder.name, there
            # Workers of a DataLoader need a parent that is no daemon.
            process = context.Process(target=_work, args=arguments)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function, *args):
        """Return the results of a function in each process, by rank.

        An error becomes a string with the traceback, in the list under its rank.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        return [pipe.recv() for pipe in self._pipes]

    def results(self, function, *args):
        """Return the results of a function that must not fail, by rank."""
        found = self.run(function, *args)
        errors = [x.text for x in found if isinstance(x, Failure)]
        assert not errors, "\n".join(errors)
        return found

    def errors(self, function, *args):
        """Return the texts of the errors of a function that must fail in each process, by rank."""
        found = self.run(function, *args)
        assert all(isinstance(x, Failure) for x in found), found
        return [x.text for x in found]

    def close(self):
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()
        self._folder.cleanup()


class Failure:
    def __init__(self, text):
        self.text = text


def start_group(rank, size, folder, seconds):
    """Start a gloo group in this process, with a timeout."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )


def _work(rank, size, folder, pipe):
    warnings.simplefilter("error")
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    start_group(rank, size, folder, 60)
    while (task := pipe.recv()) is not None:
        function, args = task
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        try:
            result = function(*args)
        except Exception:
            result = Failure(traceback.format_exc())
        pipe.send(result)
    gc.collect()  # a module that outlives the group would end the process with an abort
    distributed.barrier()
    distributed.destroy_process_group()
