"""A run that is killed while it writes leaves a whole checkpoint, from which it resumes exactly."""

import os
import random
import signal
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader

from pyro_ext._digest import digest
from pyro_ext._files import read_file
from pyro_ext.infer import EagerSVI, ImportanceWeightedELBO
from pyro_ext.infer.svi.checkpoint import read

STEPS_OF_EPOCH = 25


def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(x):
        loc = pyro.param("loc", torch.zeros(300, 100))  # large enough to be killed in the middle
        with pyro.plate("data", 50, subsample=x):
            z = pyro.sample("z", dist.Normal(loc.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", 50, subsample=x):
            pyro.sample("z", dist.Normal(slope * x, 0.7))

    loader = DataLoader(torch.randn(50), batch_size=2, shuffle=True)
    return EagerSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(2)), loader


def in_child(function, *args):
    """Start a function in a copy of this process, which only SIGKILL ends early."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are no other threads
        child = os.fork()
    if child == 0:
        try:
            function(*args)
        finally:
            os._exit(0)
    return child


def run(path):
    svi, loader = fresh()
    resume = path if path.exists() else None
    svi.run(loader, 10**6, False, checkpoint=path, checkpoint_every=1, resume=resume)


def run_once():
    """Import what a first step imports, so that the children start at once."""
    svi, loader = fresh()
    svi.run(loader, 1, False)


def state_of(svi):
    params = {name: x.detach() for name, x in pyro.get_param_store().named_parameters()}
    return digest([svi.history.state_dict(), params, svi.optim.get_state(), torch.get_rng_state()])


@pytest.mark.parametrize(
    "num_kills",
    [pytest.param(15, marks=pytest.mark.long), pytest.param(200, marks=pytest.mark.slow)],
)
def test_a_killed_run_resumes_to_the_last_bit(num_kills, tmp_path):
    path = tmp_path / "run"
    rng = random.Random(0)
    num_in_writes = num_steps = 0
    run_once()
    for _ in range(num_kills):
        child = in_child(run, path)
        before = path.stat().st_ino if path.exists() else None
        while not path.exists() or path.stat().st_ino == before:
            time.sleep(0.0005)  # until it has written once
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = list(tmp_path.glob("*.unfinished"))
        num_in_writes += len(left)
        for file in left:
            file.unlink()
        found = len(read(path)["history"]["losses"])  # whole, and not older than before
        assert found > num_steps
        num_steps = found
    print(f"{num_kills} kills, {num_in_writes} in the middle of a write, {num_steps} steps")
    assert num_in_writes > num_kills / 20
    num_epochs = num_steps // STEPS_OF_EPOCH + 1
    svi, loader = fresh()
    svi.run(loader, num_epochs, False, resume=path)
    resumed = state_of(svi)
    svi, loader = fresh()
    svi.run(loader, num_epochs, False)
    assert state_of(svi) == resumed


def write_as(writer, path):
    svi, _ = fresh()
    svi.history.losses = [float(writer)] * 2000
    svi._run_settings = {"writer": writer}
    while True:
        svi.save(path)


@pytest.mark.parametrize(
    "seconds", [pytest.param(2, marks=pytest.mark.long), pytest.param(20, marks=pytest.mark.slow)]
)
def test_two_writers_of_one_path_never_mix(seconds, tmp_path):
    path = tmp_path / "run"
    run_once()
    children = [in_child(write_as, writer, path) for writer in (1, 2)]
    seen = {1: 0, 2: 0}
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if path.exists():
                content = read(path)
                writer = content["settings"]["writer"]
                assert content["history"]["losses"].tolist() == [float(writer)] * 2000
                seen[writer] += 1
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    print(f"files read, by writer: {seen}")
    assert min(seen.values()) > 10


@pytest.mark.long
def test_flipped_bits_of_a_checkpoint_are_refused_or_harmless(tmp_path):
    svi, loader = fresh()
    svi.run(loader, 1, False, checkpoint=tmp_path / "run")
    expected = digest(read(tmp_path / "run"))
    # Most bits are those of the large parameter, so half of the flips are elsewhere.
    data = bytearray((tmp_path / "run").read_bytes())
    large = pyro.get_param_store()["loc"].detach().numpy().tobytes()
    start = data.index(large)
    rng = random.Random(0)
    refused = 0
    for i in range(500):
        position = rng.randrange(len(data) if i % 2 else start)
        bit = 1 << rng.randrange(8)
        data[position] ^= bit
        (tmp_path / "flipped").write_bytes(data)
        data[position] ^= bit
        try:
            content = read_file(tmp_path / "flipped", "pyro_ext training run", 2)
        except ValueError:
            refused += 1
        else:
            assert digest(content) == expected
    print(f"500 flipped bits: {refused} refused, {500 - refused} harmless")
    assert refused > 250
