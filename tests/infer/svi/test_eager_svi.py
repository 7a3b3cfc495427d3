"""The training loop goes through data in epochs and steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import EagerSVI, ImportanceWeightedELBO
from tests.infer.svi.programs import images
from tests.infer.svi.runs import BOTH, eager, loader, make


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0,), {}, "data .* must be at least 1, but it is 0"),
        (([],), {}, "data has 0 minibatches in epoch 1"),
        ((iter([(), ()]), 2), {"args": (images(),)}, "data has 0 minibatches in epoch 2"),
        ((3, 0), {}, "num_epochs must be at least 1, but it is 0"),
        ((3,), {"checkpoint": "/without/folder"}, "checkpoint='/without/folder' does not exist"),
        ((3,), {"checkpoint_every": 2}, "checkpoint_every needs a checkpoint"),
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
