"""Mistakes and failures of single processes, which are errors with a name in all of them."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from pyro_ext.distributed import DistributedNoise
from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer import EagerSVI, ImportanceWeightedELBO
from tests.distributed.training import Model, loader, make, parameters, rows

pytestmark = pytest.mark.long


def rank():
    return current_processes().rank


def other_shape():
    def model(x):
        pyro.param("loc", torch.zeros(2 + rank()))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    svi = EagerSVI(model, lambda x: None, pyro.optim.SGD({}), pyro.infer.Trace_ELBO())
    svi.step(torch.zeros(3) + rank())


def other_objective():
    svi = make("pathwise")
    elbo = ImportanceWeightedELBO(5 + rank(), max_plate_nesting=1)
    EagerSVI(svi.model, svi.guide, svi.optim, elbo).step(rows(4) + rank())


def other_version():
    usual = torch.__version__
    torch.__version__ = "0.0" if rank() else usual
    try:
        make("pathwise").step(rows(4) + rank())
    finally:
        torch.__version__ = usual


def plate_without_size():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    svi = EagerSVI(model, lambda x: None, pyro.optim.SGD({}), ImportanceWeightedELBO(5))
    svi.step(torch.zeros(3) + rank())


def other_size():
    def model(x):
        with pyro.plate("data", 40 + rank(), subsample=x):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    svi = EagerSVI(model, lambda x: None, pyro.optim.SGD({}), pyro.infer.Trace_ELBO())
    svi.step(torch.zeros(3) + rank())


def no_data():
    make("pathwise").run([] if rank() else [rows(4)], progress_bar=False)


def empty_stream():
    batches = () if rank() else (rows(4) for _ in range(2))
    make("pathwise").run((x for x in batches), progress_bar=False)


def not_a_number():
    data = rows(4) + rank()
    batches = [data, data * torch.nan if rank() else data]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro warns of NaN
        with pyro.validation_enabled(False):
            make("Bayesian module").run(batches, progress_bar=False)


class Failing(Model):
    def forward(self, x):
        if len(x) == 3:
            raise KeyError("no such key")
        return super().forward(x)


def failing_step():
    svi = make("pathwise")
    svi.model = Failing(False)
    svi.run([rows(4) + rank(), rows(4 - rank()), rows(4)], progress_bar=False)


def failing_loader():
    def batches():
        yield rows(4) + rank()
        yield rows(4)
        if rank() == 1:
            raise OSError("the disk is gone")
        yield rows(4)

    make("pathwise").run(batches(), progress_bar=False)


def failing_callback():
    def callback(history):
        if rank() == 1:
            raise OSError("no space left")

    make("pathwise").run([rows(4) + rank()] * 2, progress_bar=False, callback=callback)


def wrong_sampler():
    sampler = DistributedSampler(rows(), 2, 0)
    make("pathwise").run(DataLoader(rows(), 4, sampler=sampler), progress_bar=False)


def unreadable_checkpoint():
    make("pathwise").run([rows(4)], progress_bar=False, resume="/no/such/file.pt")


def two_plates():
    def model(x, y):
        loc = pyro.param("loc", torch.tensor(0.0))
        for name, value in (("first", x), ("second", y)):
            with pyro.plate(name, 40, subsample=value):
                pyro.sample(f"x_{name}", dist.Normal(loc, 1.0), obs=value)

    svi = EagerSVI(model, lambda x, y: None, pyro.optim.SGD({}), pyro.infer.Trace_ELBO())
    svi.step(torch.zeros(3), torch.zeros(3) + rank())
    svi.step(torch.zeros(3), torch.zeros(3 + rank()))


CASES = {
    other_shape: ("the shape of parameter 'loc' is (3, 'torch.float32') on rank 1, but (2, ",) * 2,
    other_objective: ("the setting 'objective.num_particles' is 6 on rank 1, but 5 on rank 0",) * 2,
    other_version: ("the version of torch is 0.0 on rank 1, but ",) * 2,
    plate_without_size: ("plate 'data' has no more rows than each of them passes (3). Give",) * 2,
    other_size: ("the size of plate 'data' is 41 on rank 1, but 40 on rank 0",) * 2,
    no_data: ("data has no minibatches on rank 1 of 2",) * 2,
    empty_stream: ("rank 1 of 2 failed with ValueError: EagerSVI.run: data has 0", "has 0 minib"),
    not_a_number: ("the loss of step 2 is nan, because of rank 1 of 2",) * 2,
    failing_step: ("rank 1 of 2 failed with KeyError: 'no such key'", "KeyError: 'no such key'"),
    failing_loader: ("rank 1 of 2 failed with OSError: the disk", "OSError: the disk is gone"),
    failing_callback: ("rank 1 of 2 failed with OSError: no space", "OSError: no space left"),
    wrong_sampler: ("the DistributedSampler of data is for rank 0 of 2",) * 2,
    unreadable_checkpoint: ("FileNotFoundError", "rank 0 of 2 failed with FileNotFoundError"),
    two_plates: ("several plates are divided over processes, and the processes have different",)
    * 2,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_mistake_has_a_name_in_each_process(pools, case):
    for text, expected in zip(pools(2).errors(case), CASES[case], strict=True):
        if expected:
            assert expected in text
    pools(2).results(step_again)


def step_again():
    return make("pathwise").step(rows(4) + rank())


def same_rows():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make("pathwise").step(rows(4))
    return [str(warning.message) for warning in caught]


def test_processes_with_the_same_rows_are_warned(pools):
    for texts in pools(2).results(same_rows):
        (text,) = texts
        assert "the first minibatch has the same rows in all 2 processes" in text


SCRIPT = """
import os, signal, sys
from datetime import timedelta
import torch
from torch import distributed
from pyro_ext.distributed import DistributedNoise
from tests.distributed.training import loader, make, parameters

torch.set_num_threads(1)
folder = sys.argv[1]
distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
rank, path = distributed.get_rank(), f"{folder}/run.pt"
is_first = not os.path.exists(f"{folder}/dead")

def callback(history):
    if is_first and rank == 1 and len(history.losses) == 12:
        open(f"{folder}/dead", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

svi = make("local plate")
resume = path if os.path.exists(path) else None
with DistributedNoise("data", seed=7, per_row=True):
    history = svi.run(loader(8), 4, False, callback, checkpoint=path, resume=resume)
if rank == 0:
    torch.save((history.losses, parameters()), f"{folder}/found.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def start(folder):
    """Run a script on two processes, which torchrun starts again after a failure."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        # A restarted process would read the addresses of the processes that have ended.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(
        [*command, "--max-restarts=1", folder / "script.py", folder],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt"), done.stderr


def undisturbed():
    svi = make("local plate")
    with DistributedNoise("data", seed=7, per_row=True):
        history = svi.run(loader(8), 4, progress_bar=False)
    return history.losses, parameters()


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_was_killed(pools, tmp_path):
    expected, _ = pools(2).results(undisturbed)
    found, log = start(tmp_path)
    assert "exitcode: -9" in log
    assert (tmp_path / "dead").exists()
    assert found[0] == expected[0]
    assert len(found[0]) == 20
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value)
