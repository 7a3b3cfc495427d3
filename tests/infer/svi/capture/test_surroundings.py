"""Threads, modes, hooks and settings around the steps."""

import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.nn.modules.module import register_module_forward_hook

from pyro_ext.infer import CompiledSVI, EagerSVI, ImportanceWeightedELBO, JackknifeELBO
from pyro_ext.infer.svi.capture.value_checks import without_looking_at_values
from tests.infer.svi.capture.programs import X, guide, observe, still


def model(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def test_captures_in_threads_leave_validation_as_it_was():
    before = dict(vars(torch.distributions.Distribution))
    start, states = threading.Barrier(4), []

    def capture():
        start.wait()
        for _ in range(50):
            with without_looking_at_values():
                dist.Normal(0.0, -1.0, validate_args=True)

    threads = [threading.Thread(target=capture) for _ in range(3)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        # Other threads still validate.
        with pytest.raises(ValueError, match="to satisfy the constraint"):
            dist.Normal(0.0, -1.0, validate_args=True)
        states.append(pyro.infer.util.is_validation_enabled())
    assert all(states)
    assert dict(vars(torch.distributions.Distribution)) == before
    assert pyro.poutine.util.is_validation_enabled.__module__ == "pyro.poutine.util"


@pytest.mark.parametrize("is_enabled", [True, False])
def test_programs_that_set_validation_for_a_block_leave_it_as_it_was(is_enabled):
    def model(x):
        with pyro.validation_enabled(False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.distributions.util.validation_enabled(True):
            observe(z, x)

    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="eager")
    with pyro.validation_enabled(is_enabled):
        usual = pyro.settings.get()
        for _ in range(3):
            svi.step(X)
        assert pyro.settings.get() == usual


def test_parameters_born_in_inference_mode_can_be_trained():
    values = []
    for mode in (torch.no_grad, torch.inference_mode):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="eager")
        with mode():
            svi.evaluate_loss(X)
        for _ in range(5):
            svi.step(X)
        with mode():
            svi.evaluate_loss(X)
        svi.step(X)
        values.append(pyro.param("loc").item())
    assert values[0] == values[1] != 0.5


def test_other_parameters_of_inference_mode_are_refused():
    with torch.inference_mode():
        guide(X)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="eager")
    with pytest.raises(RuntimeError, match=r"'loc' was created in torch.inference_mode\(\)"):
        svi.step(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: slice(0, n),
        lambda n: slice(None, n, 1),
        range,
        np.arange,
        lambda n: torch.Size([n]),
        lambda n: frozenset({n}),
        lambda n: complex(n, 0),
        lambda n: (slice(n), [range(n)]),
    ],
)
def test_arguments_are_compared_by_value(make):
    def with_rows(x, rows):
        model(x)

    svi = still(with_rows, lambda x, rows: guide(x), fallback=False)
    for n in (5, 5, 5, 6, 5, 6):
        svi.step(X, make(n))
    assert svi._graphs.count == 2


def test_rows_by_a_slice_or_range_are_those_of_svi():
    x = torch.randn(20)

    def of_rows(rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    losses = []
    for cls in (SVI, lambda *args: CompiledSVI(*args, backend="eager", fallback=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = cls(of_rows, AutoNormal(of_rows), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        rows = [slice(0, 5), slice(5, 10), np.arange(5), slice(0, 5), slice(5, 10)]
        losses.append([svi.step(r) for r in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_hooks_of_all_modules_are_followed():
    net = nn.Linear(1, 1)

    def with_net(x):
        pyro.module("net", net)
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), net(x.reshape(1)).squeeze())

    results = []
    for cls in (SVI, lambda *args: CompiledSVI(*args, backend="eager", fallback=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net.reset_parameters()
        svi = cls(with_net, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses = [svi.step(X) for _ in range(3)]
        hook = register_module_forward_hook(lambda module, args, out: 3 * out)
        try:
            losses += [svi.step(X) for _ in range(3)]
        finally:
            hook.remove()
        results.append([*losses, *(svi.step(X) for _ in range(3))])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


class LocalGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.5))
        self.scale = PyroParam(torch.tensor(0.8), constraints.positive)

    def forward(self, x):
        pyro.sample("z", dist.Normal(self.loc, self.scale))


def test_local_parameters_take_eager_steps():
    losses = []
    with pyro.settings.context(module_local_params=True):
        for cls in (SVI, lambda *args: CompiledSVI(*args, backend="eager")):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            svi = cls(model, LocalGuide(), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
            if cls is not SVI:
                with pytest.warns(UserWarning, match="module_local_params") as record:
                    losses.append([svi.step(X) for _ in range(4)])
                assert len(record) == 1
            else:
                losses.append([svi.step(X) for _ in range(4)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "make",
    [lambda: iter([1.0] * 9), lambda: (1.0 for _ in range(9)), lambda: map(float, [1] * 9)],
)
def test_iterators_are_advanced_once_a_step(make):
    values = make()

    def with_iterator(x):
        next(values)
        model(x)

    svi = still(with_iterator, num_particles=1)  # several are checked once more
    with pytest.warns(UserWarning, match="reaches the iterator 'values'"):
        svi.step(X)
    svi.step(X)
    assert len(list(values)) == 9 - 2


def test_counters_of_refused_programs_are_restored():
    counts = {"calls": 0}
    log = []

    def counting(x):
        nonlocal total
        total += 1
        counts["calls"] += 1
        log.append(total)
        model(x)

    total = 0
    svi = still(counting, num_particles=1)
    with pytest.warns(UserWarning, match="the model or guide changes"):
        svi.step(X)
    assert (total, counts["calls"], log) == (1, 1, [1])
    svi.step(X)
    assert (total, counts["calls"], log) == (2, 2, [1, 2])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "elbo",
    [ImportanceWeightedELBO(3, gradient="dreg"), JackknifeELBO(4)],
    ids=["dreg", "jackknife"],
)
def test_torch_compile_leaves_the_module_form_as_it_is(elbo):
    pyro.set_rng_seed(0)
    module = elbo(model, AutoNormal(model))
    module(X)
    results = []
    for run in (module, torch.compile(module)):
        pyro.set_rng_seed(1)
        loss = run(X)
        module.zero_grad()
        loss.backward()
        results.append([loss.item(), *(p.grad.item() for p in module.parameters())])
    assert results[0] == results[1]


def test_the_progress_bar_says_when_it_compiles(capsys):
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="eager")
    svi.run(3, args=(X,))
    assert "compiling" in capsys.readouterr().err
    eager = EagerSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    eager.run(3, args=(X,))
    assert "compiling" not in capsys.readouterr().err
