"""The training loop: epochs, early stopping, interrupts, checkpoints and resuming."""

import os
import random
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
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
from tests.infer.svi.programs import PROBLEMS, SmallVAE, images


def eager(*args, **kwargs):
    return EagerSVI(*args, **kwargs)


def compiled(*args, **kwargs):
    return CompiledSVI(*args, **kwargs, backend="eager", fallback=False)


BOTH = pytest.mark.parametrize("make_svi", [eager, compiled])


def loader(batch_size=4):
    return DataLoader(TensorDataset(images(12)), batch_size=batch_size, shuffle=True)


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

    def interrupt(history):
        decay(svi, history)
        if len(history.losses) == steps_before:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        svi.run(loader(), 4, False, interrupt, checkpoint=path)
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
    svi.run(10, 1, False, lambda h: len(h.losses) == 6, args=args, checkpoint=tmp_path / "run")
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
    with pytest.raises(ValueError, match=r"it has 'SmallVAE\.encoder\S*', which the programs do"):
        other.load(tmp_path / "run")
    pyro.clear_param_store()
    module = SmallVAE(nn.BatchNorm1d(8), nn.Dropout(0.2))
    module.decoder[2] = nn.Linear(8, 13)
    other = EagerSVI(module.model, module.guide, pyro.optim.Adam({}), problem.loss)
    with pytest.raises(ValueError, match=r"shape \(12, 8\) there and \(13, 8\) in the programs"):
        other.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0,), {}, "data .* to be an integer >= 1, got 0"),
        ((torch.zeros(3),), {}, "a number of steps or an iterable of minibatches, got Tensor"),
        (([],), {}, "expected more than 0 minibatches in epoch 1"),
        ((iter([(), ()]), 2), {"args": (images(),)}, "more than 0 minibatches in epoch 2"),
        ((3, 0), {}, "num_epochs to be an integer >= 1, got 0"),
        ((3,), {"checkpoint_every": 2}, "expected checkpoint with checkpoint_every, got None"),
        ((3,), {"checkpoint": "x", "checkpoint_every": 0}, "integer >= 1, got 0"),
    ],
)
def test_arguments_are_checked(args, options, message):
    svi, _ = make(eager)
    with pytest.raises(ValueError, match=message):
        svi.run(*args, progress_bar=False, **options)


def test_early_stopping_checks_its_arguments():
    with pytest.raises(ValueError, match="patience to be an integer >= 1, got 0"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_improvement >= 0, got -1"):
        EarlyStopping(min_improvement=-1)


def test_draws_its_history():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    history = TrainingHistory([3.0, 2.0, 1.0, 2.0], [2, 4], [(2, 2.5), (4, 1.5)])
    assert len(history.plot().lines) == 3
