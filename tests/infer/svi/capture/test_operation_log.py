"""Programs whose operations a graph would freeze take eager steps with one warning."""

import functools
import itertools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from tests.infer.svi.capture.programs import X, guide, observe

COUNTS = itertools.count()


def branch_on_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if z.sum() > 0 else -z, x)


def branch_on_an_item(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if z.sum().item() > 0 else -z, x)


def number_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=float(z.detach().abs().sum()) + 1)


def list_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=z.reshape(-1).tolist()[0] ** 2 + 1)


def array_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=1 + torch.from_numpy(z.detach().numpy()).square())


def shape_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    several = z * torch.ones(3)
    observe(z, x + 0.0 * several[several > 0].sum())


def python_random_numbers(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 1 + random.random())


def rare_python_random_numbers(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 3.0 if random.random() < 1e-9 else 1.0)


def numpy_random_numbers(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, torch.as_tensor(np.random.uniform(1, 2), dtype=torch.float32))


def numpy_generator(x, generator=np.random.default_rng(0)):  # noqa: B008
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1 + float(generator.uniform()))


def numpy_array(x, generator=np.random.default_rng(0)):  # noqa: B008
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1 + torch.from_numpy(generator.uniform(size=1)).float().squeeze())


def counter(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1.0 + next(COUNTS))


#: name -> (model, what the warning says)
REFUSED = {
    "branch": (branch_on_a_draw, "uses the value of a tensor in Python code.*'z'"),
    "branch on an item": (branch_on_an_item, "uses the value of a tensor in Python code.*'z'"),
    "number": (number_of_a_draw, "two runs of the same step differ.*'z'.*torch.tensor of"),
    "list": (list_of_a_draw, "two runs of the same step differ.*'z'.*made from other numbers"),
    "array": (array_of_a_draw, "numpy copies values out of the graph.*'z'"),
    "shape": (shape_of_a_draw, "index.Tensor depends on values"),
    "random": (python_random_numbers, "random numbers from the module random"),
    "rare random": (rare_python_random_numbers, "random numbers from the module random"),
    "numpy.random": (numpy_random_numbers, "random numbers from the module numpy.random"),
    "generator": (numpy_generator, "the model or guide changes 'default 0 of numpy_generator'"),
    "generator's array": (numpy_array, "the model or guide changes 'default 0 of numpy_array'"),
    "counter": (counter, "reaches the iterator 'COUNTS', which a capture would advance"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_refused_programs_take_eager_steps_with_one_warning(name):
    model, message = REFUSED[name]
    optim = pyro.optim.Adam({"lr": 0.01})
    loss = ImportanceWeightedELBO(1, max_plate_nesting=0)
    svi = CompiledSVI(model, guide, optim, loss, backend="eager")
    with pytest.warns(UserWarning, match=f"takes eager steps: .*{message}") as record:
        svi.step(X)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({svi.step(X) for _ in range(4)}) == 4
    strict = CompiledSVI(model, guide, optim, loss, backend="eager", fallback=False)
    with pytest.raises(RuntimeError, match=message):
        strict.step(X)


def test_eager_steps_are_those_of_svi():
    losses = {}
    for cls in (SVI, functools.partial(CompiledSVI, backend="eager")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = ImportanceWeightedELBO(1, max_plate_nesting=0)
        svi = cls(branch_on_a_draw, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses[cls] = [svi.step(X) for _ in range(5)]
    assert len({tuple(values) for values in losses.values()}) == 1
