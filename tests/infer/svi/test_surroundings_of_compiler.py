"""CompiledSVI where there is no compiler, no cache on disk, or a fork after a compilation."""

import os
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ext.infer import CompiledSVI
from tests.infer.svi.capture.programs import X, guide, observe

STEPS = "from tests.infer.svi.test_surroundings_of_compiler import {0}; {0}()"


def steps(svi):
    """Take steps, and return the warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        losses = torch.tensor([svi.step(X) for _ in range(3)])
    assert losses.isfinite().all()
    return [str(warning.message) for warning in record]


def compiled():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return CompiledSVI(
        model, lambda x: guide(x), pyro.optim.SGD({"lr": 0.1}), Trace_ELBO(), audit_every=1
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "variables",
    [
        {"CXX": "no-such-compiler"},
        pytest.param({"TORCHINDUCTOR_CACHE_DIR": "/proc"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_without_a_compiler_or_cache(tmp_path, variables):
    run("take_steps_without_compiler", tmp_path, variables)


def take_steps_without_compiler():
    (message,) = steps(compiled())
    assert message.startswith("CompiledSVI runs graphs without compiling them: inductor could not")


@pytest.mark.slow
def test_a_fork_after_a_compilation(tmp_path):
    run("take_steps_in_a_fork", tmp_path, {})


def take_steps_in_a_fork():
    torch.set_num_threads(1)
    svi = compiled()
    assert steps(svi) == []
    child = os.fork()
    if child == 0:
        known, new = steps(svi), steps(compiled())
        expected = "this process was forked after a compilation"
        os._exit(not all(len(x) == 1 and expected in x[0] for x in (known, new)))
    assert os.waitpid(child, 0)[1] == 0
    assert steps(svi) == []


def run(name, folder, variables):
    """Call a function of this module in a new process, with an empty cache."""
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **variables}
    command = [sys.executable, "-W", "ignore", "-c", STEPS.format(name)]
    subprocess.run(command, check=True, env=variables, timeout=120)
