"""A run records its losses and epochs, and stops early by them."""

import numpy as np
import pytest

from pyro_ext.infer import EarlyStopping, TrainingHistory
from tests.infer.svi.programs import images
from tests.infer.svi.runs import BOTH, eager, loader, make


@BOTH
def test_goes_through_the_data(make_svi):
    svi, _ = make(make_svi)
    history = svi.run(loader(), 3, progress_bar=False)
    assert len(history.losses) == 9
    assert history.epoch_ends == [3, 6, 9]
    assert history.epoch_losses[0] == pytest.approx(np.mean(history.losses[:3]))
    assert svi.objective.schedule.num_steps_taken == 9


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


def test_early_stopping_checks_its_arguments():
    with pytest.raises(ValueError, match="patience must be at least 1, but it is 0"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_improvement must be at least 0, but it is -1"):
        EarlyStopping(min_improvement=-1)


def test_draws_its_history():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    history = TrainingHistory([3.0, 2.0, 1.0, 2.0], [2, 4], [(2, 2.5), (4, 1.5)])
    assert len(history.plot().lines) == 3
