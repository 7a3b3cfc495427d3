"""Wrapped loaders, functions among settings, and other things that a resumed run must notice."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import constraints
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from pyro_ext.infer import EagerSVI

X = torch.linspace(-1.0, 2.0, 24)


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


def make(optim=None, constraint=constraints.real):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.5), constraint=constraint)
        pyro.sample("z", dist.Normal(loc, 1.0))

    return EagerSVI(model, guide, optim or pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())


class Shuffled(Sampler):
    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __iter__(self):
        return iter(self.generator.permutation(len(X)).tolist())

    def __len__(self):
        return len(X)


class Wrapper:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


def own_generator():
    return DataLoader(X, 6, shuffle=True, generator=torch.Generator().manual_seed(3))


LOADERS = {
    "tqdm": lambda: tqdm(own_generator(), disable=True),
    "wrapper": lambda: Wrapper(own_generator()),
    "NumPy": lambda: DataLoader(X, 6, sampler=Shuffled()),
    "wrapped NumPy": lambda: tqdm(Wrapper(DataLoader(X, 6, sampler=Shuffled())), disable=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_generators_are_found_in_wrappers(name, tmp_path):
    expected = make().run(LOADERS[name](), 3, False).losses
    stop = {"callback": lambda history: len(history.losses) == 6}
    make().run(LOADERS[name](), 3, False, checkpoint=tmp_path / "run", **stop)
    assert make().run(LOADERS[name](), 3, False, resume=tmp_path / "run").losses == expected


def lambda_lr(base):
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}}
    return pyro.optim.LambdaLR({**adam, "lr_lambda": lambda epoch: base**epoch})


def partial_lr(base):
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}}
    return pyro.optim.LambdaLR({**adam, "lr_lambda": functools.partial(pow, base)})


@pytest.mark.parametrize("make_optim", [lambda_lr, partial_lr])
def test_functions_of_other_numbers_are_noticed(make_optim, tmp_path):
    make(make_optim(0.9)).run(2, 2, False, args=(X,), checkpoint=tmp_path / "run")
    make(make_optim(0.9)).run(2, 3, False, args=(X,), resume=tmp_path / "run")
    with pytest.raises(ValueError, match=r"'scheduler.lr_lambda' is .*0\.1.*, but it was .*0\.9"):
        make(make_optim(0.1)).run(2, 3, False, args=(X,), resume=tmp_path / "run")


@pytest.mark.parametrize("low", [0, 0.0, torch.tensor(0.0)])
def test_equal_constraints_are_equal(low, tmp_path):
    svi = make(constraint=constraints.interval(0, 1))
    svi.run(2, 1, False, args=(X,), checkpoint=tmp_path / "run")
    make(constraint=constraints.interval(low, 1.0)).load(tmp_path / "run", X)
    with pytest.raises(ValueError, match=r"'loc.constraint' is Interval"):
        make(constraint=constraints.interval(low, 2.0)).load(tmp_path / "run", X)


def test_a_file_from_before_the_first_step_is_loaded(tmp_path):
    svi = make()
    svi.save(tmp_path / "run")
    expected = [svi.step(X) for _ in range(3)]
    svi = make()
    pyro.set_rng_seed(7)
    svi.load(tmp_path / "run", X)
    assert [svi.step(X) for _ in range(3)] == expected


def test_late_parameters_keep_their_own_learning_rate(tmp_path):
    def late(lr):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def guide(x):
            loc = pyro.param("loc", torch.tensor(0.5))
            if len(svi.history.epoch_ends) >= 2:
                loc = loc + pyro.param("late", torch.tensor(1.0))
            pyro.sample("z", dist.Normal(loc, 1.0))

        adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}}
        optim = pyro.optim.ExponentialLR({**adam, "gamma": 0.5})
        svi = EagerSVI(model, guide, optim, Trace_ELBO())
        return svi

    def rates(svi):
        return [own.optimizer.param_groups[0]["lr"] for own in svi.optim.optim_objs.values()]

    expected = late(0.2)
    expected.run(2, 4, False, args=(X,))
    late(0.1).run(2, 4, False, args=(X,), checkpoint=tmp_path / "run")
    svi = late(0.2)
    svi.run(2, 4, False, args=(X,), resume=tmp_path / "run", allow_changes=["optimizer.lr"])
    assert rates(svi) == pytest.approx(rates(expected))


@pytest.mark.parametrize("names", [None, "optimizer.lr", [1], 3])
def test_wrong_names_are_described(names, tmp_path):
    make().run(2, 1, False, args=(X,), checkpoint=tmp_path / "run")
    with pytest.raises(TypeError, match="allow_changes must be a list of names, but it has"):
        make().load(tmp_path / "run", X, allow_changes=names)
