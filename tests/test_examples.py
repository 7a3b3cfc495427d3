"""Each script of ``examples/`` has the same losses with compiled steps as with eager ones."""

import importlib.util
import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from pyro.infer import SVI

from pyro_ext.infer import CompiledSVI, compile_elbo

EXAMPLES = Path(__file__).parent.parent / "examples"
#: script -> the library that it needs
LIBRARIES = {
    "cell2location_signatures": "cell2location",
    "chirho_counterfactual": "chirho",
    "decipher_cells": "decipher",
    "gpytorch_gp": "gpytorch",
    "mofaflex_factors": "mofaflex",
    "py_irt_ability": "py_irt",
    "scvi_amortized_lda": "scvi",
    "zuko_guide": "zuko",
}
#: script -> why its steps are eager, a part of the warning
EAGER = {"gpytorch_gp": "uses the value of a tensor in Python code"}
COMPILED = [script for script in LIBRARIES if script not in EAGER]
NUM_STEPS = 20


def load(script):
    pytest.importorskip(LIBRARIES[script], exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eager_elbo(elbo):
    return elbo


def compiled_elbo(elbo):
    return compile_elbo(elbo, backend="eager", fallback=False)


def compiled_svi(*args, fallback=False, **kwargs):
    return CompiledSVI(*args, **kwargs, backend="eager", fallback=fallback)


#: the second parameter of a script's function ``train`` -> its eager and its compiled value
FRONTS = {"compile": (eager_elbo, compiled_elbo), "make_svi": (SVI, compiled_svi)}


def assert_same(losses, expected):
    assert expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0.0)


def test_every_script_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LIBRARIES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the libraries; fallback=False leaves none of ours
@pytest.mark.parametrize("script", COMPILED)
def test_compiled_losses_equal_eager_ones(script):
    train = load(script).train
    _, front = inspect.signature(train).parameters
    expected, losses = (train(NUM_STEPS, make) for make in FRONTS[front])
    assert_same(losses, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", EAGER)
def test_eager_steps_say_why_and_equal_those_of_svi(script):
    train = load(script).train
    expected = train(NUM_STEPS, SVI)
    with pytest.warns(UserWarning, match=EAGER[script]):
        losses = train(NUM_STEPS, partial(compiled_svi, fallback=True))
    assert_same(losses, expected)
