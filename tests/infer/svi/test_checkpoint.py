"""Checkpoints hold a run, and other files are refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ext._digest import digest
from pyro_ext.infer import EagerSVI
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
