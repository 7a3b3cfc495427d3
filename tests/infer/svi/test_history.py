"""A run records its losses and epochs, and stops early by them."""

import copy
import math
import random

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


def old_definition(history, patience, min_improvement):
    """Whether to stop, by one pass over all evaluations."""
    best, best_index = math.inf, 0
    for index, (_, value) in enumerate(history.evaluations):
        if value < best - min_improvement:
            best, best_index = value, index
    return len(history.evaluations) - 1 - best_index >= patience


@pytest.mark.parametrize("seed", range(30))
def test_early_stopping_is_that_of_one_pass_over_all_evaluations(seed):
    rng = random.Random(seed)
    stopping = EarlyStopping(rng.randint(1, 6), rng.choice([0.0, 0.5, 2.0]))
    history = TrainingHistory()
    for _ in range(200):
        loss = rng.choice([rng.gauss(0, 3), float(rng.randint(-3, 3)), math.inf, math.nan])
        history.losses += [loss] * rng.randint(1, 3)
        history.epoch_ends.append(len(history.losses))
        stops = stopping(history)
        assert stops is history.is_converged
        assert stops == old_definition(history, stopping.patience, stopping.min_improvement)
        assert np.array_equal(history.last_epoch_loss, history.epoch_losses[-1], equal_nan=True)
        match rng.randrange(8):
            case 0:
                history = TrainingHistory.from_state_dict(history.state_dict())
            case 1:
                stopping = copy.deepcopy(stopping)
            case 2:
                stopping.min_improvement = rng.choice([0.0, 1.0])
            case 3:
                del history.evaluations[rng.randint(0, len(history.evaluations)) :]
            case 4:
                history = TrainingHistory()


def test_an_epoch_costs_early_stopping_as_much_as_the_first():
    """Each epoch reads its own losses and one evaluation, also after a resume."""

    class Counting(list):
        num_reads = 0

        def __getitem__(self, index):
            result = super().__getitem__(index)
            Counting.num_reads += len(result) if isinstance(index, slice) else 1
            return result

        def __iter__(self):
            for x in super().__iter__():
                Counting.num_reads += 1
                yield x

    history = TrainingHistory(Counting(), Counting(), Counting())
    stopping = EarlyStopping(patience=10**6)
    reads = []
    for epoch in range(1000):
        if epoch == 500:
            stopping = EarlyStopping(patience=10**6)
        history.losses.extend([1.0, 2.0])
        history.epoch_ends.append(len(history.losses))
        before = Counting.num_reads
        stopping(history)
        reads.append(Counting.num_reads - before)
    assert max(reads[:500] + reads[501:]) < 15
    assert reads[500] < 1000


def test_a_history_is_held_by_a_file():
    history = TrainingHistory([0.1, math.inf, -3.0], [2], [(2, 0.3)], True)
    assert TrainingHistory.from_state_dict(history.state_dict()) == history
    assert TrainingHistory.from_state_dict(TrainingHistory().state_dict()) == TrainingHistory()
