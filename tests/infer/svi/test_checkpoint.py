"""Checkpoints hold a run, and other files are refused."""

import collections
import enum
import os
from unittest.mock import Mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ext._digest import digest
from pyro_ext._random_states import random_states
from pyro_ext.infer import EagerSVI, ImportanceWeightedELBO
from tests.infer.svi.programs import PROBLEMS, SmallVAE, images
from tests.infer.svi.runs import compiled, eager, loader, make


def content(path):
    return torch.load(path, weights_only=True)["content"]


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
        sizes.append(path.exists() and len(content(path)["history"]["losses"]))

    svi.run(7, 1, False, look, args=(images(),), checkpoint=tmp_path / "run", checkpoint_every=2)
    assert sizes == [False, False, 2, 2, 4, 4, 6]
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_checkpoint_of_other_programs_is_refused(tmp_path):
    svi, _ = make(eager)
    svi.run(2, 1, False, args=(images(),), checkpoint=tmp_path / "run")
    problem = PROBLEMS["AutoNormal"]()
    other = EagerSVI(problem.model, problem.guide, pyro.optim.Adam({}), problem.loss)
    with pytest.raises(ValueError, match=r"AutoNormal.locs.scale\S+ .*but not in both"):
        other.load(tmp_path / "run", *problem.args)
    pyro.clear_param_store()
    module = SmallVAE(nn.BatchNorm1d(8), nn.Dropout(0.2), num_pixels=13)
    other = EagerSVI(module.model, module.guide, pyro.optim.Adam({}), problem.loss)
    with pytest.raises(ValueError, match=r"has shape \(8, 13\), but it had shape \(8, 12\)"):
        other.load(tmp_path / "run", torch.ones(3, 13))
    svi, _ = make(eager)
    svi.optim = pyro.optim.SGD({"lr": 0.1})
    with pytest.raises(ValueError, match="'optimizer' is 'SGD', but it was 'Adam'"):
        svi.load(tmp_path / "run", images())


@pytest.mark.parametrize("content", [b"", b"words", None])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "other"
    if content is None:
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(content)
    svi, _ = make(eager)
    with pytest.raises(ValueError, match=r"Checkpoint: .*other is .*not a pyro_ext training run"):
        svi.run(3, args=(images(),), progress_bar=False, resume=path)
    with pytest.raises(FileNotFoundError):
        svi.load(tmp_path / "none", images())


def test_a_loaded_state_is_saved_as_it_was(tmp_path):
    svi, _ = make(eager)
    svi.run(3, 1, False, args=(images(),), checkpoint=tmp_path / "run")
    svi, _ = make(eager)
    svi.load(tmp_path / "run", images())
    svi.save(tmp_path / "again")
    first, second = (content(tmp_path / name)["optimizer"] for name in ("run", "again"))
    assert digest(first) == digest(second)


def test_loading_into_an_svi_that_has_stepped_is_exact(tmp_path):
    svi, _ = make(compiled)
    svi.run(5, 1, False, args=(images(),))
    svi.save(tmp_path / "run")
    first = [svi.step(images()) for _ in range(5)]
    svi.load(tmp_path / "run", images())
    assert [svi.step(images()) for _ in range(5)] == first


def test_a_path_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    runs = []

    def model(x):
        runs.append(x)

    svi = EagerSVI(model, model, pyro.optim.Adam({}), Trace_ELBO())
    for name in ("folder", "fifo"):
        with pytest.raises(OSError, match=f"{name}' is not a regular file"):
            svi.run([1], progress_bar=False, checkpoint=tmp_path / name)
    with pytest.raises(OSError, match=r"File name too long: '.*/xxx"):
        svi.run([1], progress_bar=False, checkpoint=tmp_path / ("x" * 250))
    assert runs == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"]


def test_a_state_that_was_saved_before_the_first_step(tmp_path):
    svi, _ = make(eager)
    svi.evaluate_loss(images())
    svi.save(tmp_path / "run")
    expected = [svi.step(images()) for _ in range(3)]
    svi, _ = make(eager)
    svi.load(tmp_path / "run", images())
    assert [svi.step(images()) for _ in range(3)] == expected


def test_a_checkpoint_runs_no_code(tmp_path):
    svi, _ = make(eager)
    svi.run(2, 1, False, args=(images(),), checkpoint=tmp_path / "run")
    whole = torch.load(tmp_path / "run", weights_only=True)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    whole["content"]["history"]["losses"] = Evil()
    torch.save(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"run is damaged, or is not a pyro_ext training run"):
        svi.load(tmp_path / "run", images())
    assert not (tmp_path / "was run").exists()


def test_a_failed_trial_run_changes_nothing(tmp_path):
    fails = False

    def make_failing():
        net = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

        def model(x):
            pyro.module("net", net)
            pyro.param("loc", torch.tensor(0.0))
            net(x)
            if fails:
                raise KeyError("by the model")

        return EagerSVI(model, lambda x: None, pyro.optim.Adam({}), Trace_ELBO()), net

    x = torch.randn(5, 3)
    svi, _ = make_failing()
    svi.run(2, 1, False, args=(x,), checkpoint=tmp_path / "run")
    pyro.clear_param_store()
    svi, net = make_failing()
    fails = True
    before = digest([net.state_dict(), random_states()])
    with pytest.raises(KeyError, match="by the model"):
        svi.run(2, 2, False, args=(x,), resume=tmp_path / "run")
    assert digest([net.state_dict(), random_states()]) == before
    assert len(pyro.get_param_store()) == 0
    assert svi.history.losses == []


class Level(enum.IntEnum):
    HIGH = 3


def test_settings_of_any_kind_can_be_saved(tmp_path):
    """A setting that is no plain value is held by a name."""

    class Odd(ImportanceWeightedELBO):
        def __init__(self):
            super().__init__(2)
            self.level = Level.HIGH
            self.array = np.array([object()])
            self.itself = self
            self.named = collections.namedtuple("named", "a b")(1, self)
            self.mock = Mock()
            self.kind = nn.Sequential
            self.words = {"b", "a"}
            self.gradient = np.str_("pathwise")

    def run(**options):
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": np.float32(0.5), "eps": torch.tensor(1e-3)}, clip_args={})
        svi = EagerSVI(lambda: pyro.param("loc", torch.ones(2)).sum(), lambda: None, optim, Odd())
        return svi.run(2, progress_bar=False, **options)

    run(checkpoint=tmp_path / "run")
    run(resume=tmp_path / "run", num_epochs=2)


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
    saved = content(tmp_path / "run")
    assert len(saved["history"]["losses"]) == 2
    assert saved["params"]["loc"].isfinite()
