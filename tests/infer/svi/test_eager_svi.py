"""The training loop: epochs, early stopping, interrupts, checkpoints and resuming."""

import functools
import os
import random
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoStructured
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext.infer import (
    CompiledSVI,
    EagerSVI,
    EarlyStopping,
    ImportanceWeightedELBO,
    KLWeightedELBO,
    LinearKL,
    TrainingHistory,
)
from tests.infer.svi.programs import (
    PROBLEMS,
    Problem,
    SmallVAE,
    images,
    regression,
    regression_data,
)


@pytest.fixture(autouse=True)
def python_handles_interrupts():
    """A process in the background of a plain shell inherits that they are ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def eager(*args, **kwargs):
    return EagerSVI(*args, **kwargs)


def compiled(*args, **kwargs):
    return CompiledSVI(*args, **kwargs, backend="eager", fallback=False)


BOTH = pytest.mark.parametrize("make_svi", [eager, compiled])


def loader(batch_size=4):
    return DataLoader(TensorDataset(images(12)), batch_size=batch_size, shuffle=True)


def interrupt_after(num_steps):
    def callback(history):
        if len(history.losses) == num_steps:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def make(make_svi, scheduler=False):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    module = SmallVAE(nn.BatchNorm1d(8), nn.Dropout(0.2))
    optim = pyro.optim.Adam({"lr": 0.01})
    if scheduler:
        optim = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
        )
    loss = KLWeightedELBO(ImportanceWeightedELBO(1, max_plate_nesting=1), LinearKL(20), "all")
    return make_svi(module.model, module.guide, optim, loss), module


@BOTH
def test_goes_through_the_data(make_svi):
    svi, _ = make(make_svi)
    history = svi.run(loader(), 3, progress_bar=False)
    assert len(history.losses) == 9
    assert history.epoch_ends == [3, 6, 9]
    assert history.epoch_losses[0] == pytest.approx(np.mean(history.losses[:3]))
    assert svi.objective.schedule.num_steps_taken == 9


@BOTH
def test_takes_a_number_of_steps(make_svi):
    svi, _ = make(make_svi)
    calls = []
    history = svi.run(
        5, progress_bar=False, args=(images(),), callback=lambda h: calls.append(len(h.losses))
    )
    assert len(history.losses) == 5
    assert calls == [1, 2, 3, 4, 5]


def test_steps_are_those_of_a_loop_of_ones_own():
    svi, _ = make(eager)
    history = svi.run(loader(), 2, progress_bar=False)
    svi, _ = make(eager)
    expected = []
    for _ in range(2):
        for batch in loader():
            expected.append(svi.step(*batch))
            svi.objective.schedule.step()
    assert history.losses == expected


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ([1.0, 2.0], (), {}),
        ((1.0,), (2.0,), {}),
        (1.0, (), {"y": 2.0}),
        ({"x": 1.0, "y": 2.0}, (), {}),
        ({"x": 1.0}, (), {"y": 2.0}),
    ],
)
def test_minibatches_become_arguments(batch, args, kwargs):
    seen = []

    def model(x, y):
        seen.append((x, y))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(x + y))

    svi = EagerSVI(model, lambda x, y: None, pyro.optim.Adam({}), ImportanceWeightedELBO(1))
    svi.run([batch], args=args, kwargs=kwargs, progress_bar=False)
    assert seen[-1] == (1.0, 2.0)


def test_shows_progress(capsys):
    svi, _ = make(eager)
    svi.run(loader(), 2)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "loss=" in shown
    svi.run(loader(), 2, progress_bar=False)
    assert "step" not in capsys.readouterr().err


@BOTH
def test_stops_early(make_svi):
    svi, _ = make(make_svi)
    held_out = iter([5.0, 4.0, 4.0, 4.5, 3.0])
    stopping = EarlyStopping(patience=2, evaluate=lambda: next(held_out))
    history = svi.run(loader(), 10, progress_bar=False, callback=stopping)
    assert history.evaluations == [(3, 5.0), (6, 4.0), (9, 4.0), (12, 4.5)]
    assert len(history.losses) == 12


def test_a_minimal_improvement_counts_from_the_best():
    history = TrainingHistory()
    stopping = EarlyStopping(patience=2, min_improvement=0.5)
    for loss, stops in [(3.0, False), (2.8, False), (2.6, True)]:
        history.losses.append(loss)
        history.epoch_ends.append(len(history.losses))
        assert stopping(history) is stops


def test_data_without_a_length():
    class Stream:
        def __iter__(self):
            return iter([images(4)] * 3)

    svi, _ = make(eager)
    history = svi.run(Stream(), 2, progress_bar=False, callback=EarlyStopping())
    assert history.epoch_ends == [3, 6]
    assert [steps for steps, _ in history.evaluations] == [3, 6]


@BOTH
@pytest.mark.parametrize("steps_before", [1, 4, 6])
@pytest.mark.parametrize("scheduler", [False, True])
def test_resumes_to_the_last_bit(make_svi, steps_before, scheduler, tmp_path):
    path = tmp_path / "run.pt"

    def decay(svi, history):
        if scheduler and history.is_epoch_end:
            svi.optim.step()

    def result(svi, module):
        return (
            svi.history,
            {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()},
            {name: tensor.clone() for name, tensor in module.state_dict().items()},
            pyro.util.get_rng_state(),
            svi.objective.schedule.num_steps_taken,
        )

    svi, module = make(make_svi, scheduler)
    svi.run(loader(), 4, False, lambda history: decay(svi, history))
    expected = result(svi, module)

    svi, module = make(make_svi, scheduler)

    def decay_and_interrupt(history):
        decay(svi, history)
        interrupt_after(steps_before)(history)

    with pytest.raises(KeyboardInterrupt):
        svi.run(loader(), 4, False, decay_and_interrupt, checkpoint=path)
    assert len(svi.history.losses) == steps_before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    svi, module = make(make_svi, scheduler)
    pyro.set_rng_seed(77)
    random.random()
    svi.run(loader(), 4, False, lambda history: decay(svi, history), resume=path)
    history, params, state, rng, num_steps = result(svi, module)
    assert history == expected[0]
    assert params.keys() == expected[1].keys()
    assert [name for name in params if not torch.equal(params[name], expected[1][name])] == []
    assert [name for name in state if not torch.equal(state[name], expected[2][name])] == []
    assert torch.equal(rng["torch"], expected[3]["torch"])
    assert num_steps == expected[4]


@BOTH
@pytest.mark.parametrize("name", ["AutoNormal", "BayesianModule", "subsampled plate, locals"])
def test_resumes_programs_that_make_their_parameters(make_svi, name, tmp_path):
    def fresh():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem = PROBLEMS[name]()
        optim = pyro.optim.Adam({"lr": 0.01})
        return make_svi(problem.model, problem.guide, optim, problem.loss), problem.args

    svi, args = fresh()
    expected = svi.run(10, 1, False, args=args).losses
    params = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    svi, args = fresh()
    with pytest.raises(KeyboardInterrupt):
        svi.run(10, 1, False, interrupt_after(6), args=args, checkpoint=tmp_path / "run")
    svi, args = fresh()
    assert svi.run(10, 1, False, args=args, resume=tmp_path / "run").losses == expected
    for name, param in pyro.get_param_store().named_parameters():
        assert torch.equal(param, params[name])


def test_a_complete_run_has_nothing_to_resume(tmp_path):
    svi, _ = make(eager)
    svi.run(loader(), 2, progress_bar=False, checkpoint=tmp_path / "run")
    assert len(svi.run(loader(), 2, False, resume=tmp_path / "run").losses) == 6
    assert len(svi.run(loader(), 3, False, resume=tmp_path / "run").losses) == 9
    assert len(svi.run(loader(), 1, False).losses) == 3


def test_checkpoints_between_epochs(tmp_path):
    svi, _ = make(eager)
    sizes = []

    def look(history):
        path = tmp_path / "run"
        sizes.append(path.exists() and len(torch.load(path, weights_only=False)["history"].losses))

    svi.run(7, 1, False, look, args=(images(),), checkpoint=tmp_path / "run", checkpoint_every=2)
    assert sizes == [False, False, 2, 2, 4, 4, 6]
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_checkpoint_of_other_programs_is_refused(tmp_path):
    svi, _ = make(eager)
    svi.run(2, 1, False, args=(images(),), checkpoint=tmp_path / "run")
    problem = PROBLEMS["AutoNormal"]()
    other = EagerSVI(problem.model, problem.guide, pyro.optim.Adam({}), problem.loss)
    with pytest.raises(ValueError, match=r"AutoNormal.locs.scale\S+ .*are on one side only"):
        other.load(tmp_path / "run", *problem.args)
    pyro.clear_param_store()
    module = SmallVAE(nn.BatchNorm1d(8), nn.Dropout(0.2), num_pixels=13)
    other = EagerSVI(module.model, module.guide, pyro.optim.Adam({}), problem.loss)
    with pytest.raises(ValueError, match=r"shape \(8, 12\) there and \(8, 13\) in the programs"):
        other.load(tmp_path / "run", torch.ones(3, 13))
    svi, _ = make(eager)
    svi.optim = pyro.optim.SGD({"lr": 0.1})
    with pytest.raises(ValueError, match="expected the optimiser Adam, got SGD"):
        svi.load(tmp_path / "run", images())


@pytest.mark.parametrize("content", [b"", b"words", None])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "other"
    if content is None:
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(content)
    svi, _ = make(eager)
    with pytest.raises(ValueError, match=r"Checkpoint: expected .*other"):
        svi.run(3, args=(images(),), progress_bar=False, resume=path)
    with pytest.raises(FileNotFoundError):
        svi.load(tmp_path / "none", images())


def wrapped_net(wrap):
    net = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

    def model(nets, x, y):
        pyro.module("net", nets[0])
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(nets[0](x).squeeze(-1), 1.0), obs=y)

    def guide(x, y):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return Problem(wrap(model, net), guide, Trace_ELBO(), regression_data())


WRAPPERS = {
    "partial": lambda model, net: functools.partial(model, [net]),
    "scale": lambda model, net: pyro.poutine.scale(functools.partial(model, (net,)), scale=0.5),
    "condition": lambda model, net: pyro.condition(lambda x, y: model({0: net}, x, y), {}),
}


@BOTH
@pytest.mark.parametrize("name", [*WRAPPERS, "AutoIAFNormal", "AutoStructured"])
@pytest.mark.filterwarnings("ignore:CompiledSVI takes eager steps")
def test_resumes_programs_of_many_kinds(make_svi, name, tmp_path):
    def fresh():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if name in WRAPPERS:
            problem = wrapped_net(WRAPPERS[name])
        else:
            guide = {"AutoIAFNormal": AutoIAFNormal, "AutoStructured": structured}[name]
            problem = Problem(regression, guide(regression), Trace_ELBO(), regression_data())
        optim = pyro.optim.Adam({"lr": 0.01})
        return make_svi(problem.model, problem.guide, optim, problem.loss), problem.args

    svi, args = fresh()
    expected = svi.run(6, 2, False, args=args).losses
    for end in (4, 9):
        svi, args = fresh()
        resume = None if end == 4 else tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            svi.run(
                6,
                2,
                False,
                interrupt_after(end),
                args=args,
                checkpoint=tmp_path / "run",
                resume=resume,
            )
    svi, args = fresh()
    assert svi.run(6, 2, False, args=args, resume=tmp_path / "run").losses == expected


def structured(model):
    return AutoStructured(model, conditionals="normal", dependencies="linear")


def test_a_state_that_waits_for_its_parameter_is_saved(tmp_path):
    svi, _ = make(eager)
    svi.run(3, 1, False, args=(images(),), checkpoint=tmp_path / "run")
    svi, _ = make(eager)
    svi.load(tmp_path / "run", images())
    svi.save(tmp_path / "again")
    first, second = (torch.load(tmp_path / n, weights_only=False) for n in ("run", "again"))
    assert first["optim"].keys() == second["optim"].keys()


def test_loading_into_an_svi_that_has_stepped_is_exact(tmp_path):
    svi, _ = make(compiled)
    svi.run(5, 1, False, args=(images(),))
    svi.save(tmp_path / "run")
    first = [svi.step(images()) for _ in range(5)]
    svi.load(tmp_path / "run", images())
    assert [svi.step(images()) for _ in range(5)] == first


def test_a_generator_of_the_loader_is_resumed(tmp_path):
    def data():
        generator = torch.Generator().manual_seed(5)
        dataset = TensorDataset(images(12))
        return DataLoader(dataset, batch_size=4, shuffle=True, generator=generator)

    svi, _ = make(eager)
    expected = svi.run(data(), 3, False).losses
    svi, _ = make(eager)
    with pytest.raises(KeyboardInterrupt):
        svi.run(data(), 3, False, interrupt_after(5), checkpoint=tmp_path / "run")
    svi, _ = make(eager)
    assert svi.run(data(), 3, False, resume=tmp_path / "run").losses == expected


def test_data_without_a_length_resumes_at_the_end_of_an_epoch(tmp_path):
    class Stream:
        def __iter__(self):
            return iter([images(4)] * 3)

    svi, _ = make(eager)
    with pytest.raises(KeyboardInterrupt):
        svi.run(Stream(), 3, False, interrupt_after(3), checkpoint=tmp_path / "run")
    svi, _ = make(eager)
    assert svi.run(Stream(), 3, False, resume=tmp_path / "run").epoch_ends == [3, 6, 9]


def test_an_epoch_is_as_long_as_its_data_say():
    class Growing:
        length = 1

        def __len__(self):
            return self.length + 1

        def __iter__(self):
            self.length += 1
            return iter([images(4)] * self.length)

    svi, _ = make(eager)
    assert svi.run(Growing(), 4, False).epoch_ends == [2, 5, 9, 14]


def test_a_run_that_has_converged_has_ended(tmp_path):
    svi, _ = make(eager)
    stopping = EarlyStopping(patience=2, min_improvement=1e9)
    history = svi.run(loader(), 10, False, stopping, checkpoint=tmp_path / "run")
    assert history.is_converged
    assert len(history.epoch_ends) == 3
    svi, _ = make(eager)
    again = svi.run(loader(), 10, False, stopping, resume=tmp_path / "run")
    assert again == history


def test_a_nan_leaves_the_checkpoint_as_it_was(tmp_path):
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    svi = EagerSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO())
    data = [torch.tensor(x) for x in (2.0, 2.0, torch.nan, 2.0)]
    with (
        pyro.validation_enabled(False),
        pytest.warns(UserWarning, match="Encountered NaN"),
        pytest.raises(ValueError, match="the loss of step 3 is NaN"),
    ):
        svi.run(data, progress_bar=False, checkpoint=tmp_path / "run", checkpoint_every=1)
    saved = torch.load(tmp_path / "run", weights_only=False)
    assert len(saved["history"].losses) == 2
    assert saved["params"]["loc"].isfinite()


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0,), {}, "data .* must be at least 1, but it is 0"),
        (([],), {}, "expected more than 0 minibatches in epoch 1"),
        ((iter([(), ()]), 2), {"args": (images(),)}, "more than 0 minibatches in epoch 2"),
        ((3, 0), {}, "num_epochs must be at least 1, but it is 0"),
        ((3,), {"checkpoint": "/without/folder"}, "in a folder that exists, got /without/folder"),
        ((3,), {"checkpoint_every": 2}, "expected checkpoint with checkpoint_every, got None"),
        ((3,), {"checkpoint": "x", "checkpoint_every": 0}, "must be at least 1, but it is 0"),
    ],
)
def test_arguments_are_checked(args, options, message):
    svi, _ = make(eager)
    with pytest.raises(ValueError, match=message):
        svi.run(*args, progress_bar=False, **options)


def test_a_tensor_is_no_iterable_of_minibatches():
    svi, _ = make(eager)
    with pytest.raises(TypeError, match=r"data must be .* but it is a tensor of shape \(3,\)"):
        svi.run(torch.zeros(3))


def test_early_stopping_checks_its_arguments():
    with pytest.raises(ValueError, match="patience must be at least 1, but it is 0"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_improvement >= 0, got -1"):
        EarlyStopping(min_improvement=-1)


def test_draws_its_history():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    history = TrainingHistory([3.0, 2.0, 1.0, 2.0], [2, 4], [(2, 2.5), (4, 1.5)])
    assert len(history.plot().lines) == 3
