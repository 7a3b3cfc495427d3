"""SIGTERM ends a run after its step, with a checkpoint from which the run goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader

from pyro_ext.infer import CompiledSVI, EagerSVI

X = torch.linspace(-1.0, 1.0, 12)


def model(x):
    with pyro.plate("data", 12, subsample=x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", 12, subsample=x):
        pyro.sample("z", dist.Normal(slope * x, 0.7))


def train(kind, callback=None, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = pyro.optim.Adam({"lr": 0.05})
    kind, more = (EagerSVI, {}) if kind == "eager" else (CompiledSVI, {"backend": "eager"})
    loader = DataLoader(X, batch_size=4, shuffle=True)
    svi = kind(model, guide, optim, Trace_ELBO(max_plate_nesting=1), **more)
    return svi.run(loader, 4, False, callback, **options)


def terminate_after(num_steps):
    def callback(history):
        if len(history.losses) == num_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


@pytest.mark.long
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_a_terminated_process_leaves_a_checkpoint(kind, tmp_path):
    path = tmp_path / "run.pt"
    code = (
        "from tests.test_sigterm import *\n"
        f"train({kind!r}, terminate_after(5), checkpoint={str(path)!r})\n"
        "print('survived')"
    )
    root = Path(__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (-signal.SIGTERM, ""), child.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    resumed = train(kind, resume=path)
    assert resumed.losses == train(kind).losses


@pytest.fixture
def usual():
    """The handler of SIGTERM, restored after the test."""
    handler = signal.getsignal(signal.SIGTERM)
    yield handler
    signal.signal(signal.SIGTERM, handler)


def test_a_handler_that_exits_does_so_after_the_checkpoint(usual, tmp_path):
    def leave(number, frame):
        assert (tmp_path / "run.pt").is_file()
        sys.exit(3)

    signal.signal(signal.SIGTERM, leave)
    with pytest.raises(SystemExit):
        train("eager", terminate_after(5), checkpoint=tmp_path / "run.pt")
    assert signal.getsignal(signal.SIGTERM) is leave
    assert train("eager", resume=tmp_path / "run.pt").losses == train("eager").losses


def test_a_run_goes_on_after_a_handler_that_returns(usual):
    steps = []
    signal.signal(signal.SIGTERM, lambda number, frame: steps.append(len(history.losses)))

    def callback(now):
        nonlocal history
        history = now
        terminate_after(2)(now)
        terminate_after(5)(now)
        return bool(steps) and steps[-1] == 5 and len(now.losses) == 7

    history = None
    assert len(train("eager", callback).losses) == 7
    assert steps == [2, 5]


@pytest.mark.usefixtures("python_handles_interrupts")
def test_a_failure_inside_of_a_step_saves_no_half_step(tmp_path):
    """A signal also ends the workers of a loader, which may fail the step that is under way."""
    path, batches = tmp_path / "run.pt", list(X.split(4))
    fails = []

    def failing_guide(x):
        if fails:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("a worker was killed")
        guide(x)

    def make():
        optim = pyro.optim.Adam({"lr": 0.05})
        return EagerSVI(model, failing_guide, optim, Trace_ELBO(max_plate_nesting=1))

    def fail_later(history):
        if len(history.losses) == 4:  # the checkpoint is that of the third step
            fails.append(True)

    interrupted = make()
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(batches, 2, False, fail_later, checkpoint=path)
    fails.clear()
    first = interrupted.history.losses
    resumed = make().run(batches, 2, False, resume=path).losses
    assert (len(first), len(resumed)) == (4, 6)
    assert resumed[:4] == first
