"""Losses stay on the device for some steps, and are checked when they are read."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import CompiledSVI, EagerSVI, EarlyStopping, ImportanceWeightedELBO
from pyro_ext.infer.svi.joint_optimizer import JointOptimizer

KINDS = {
    "eager": EagerSVI,
    "compiled": lambda *args, **kwargs: CompiledSVI(*args, backend="eager", **kwargs),
}
EVERY_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0, validate_args=False))
    pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    pyro.sample("z", dist.Normal(loc, 0.7, validate_args=False))


@pytest.fixture
def new_svi():
    def new(make, every, optim=None):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = optim or pyro.optim.Adam({"lr": 0.1})
        return make(model, guide, optim, ImportanceWeightedELBO(4), reads_loss_every=every)

    return new


@EVERY_KIND
def test_steps_are_those_with_losses_that_are_read(make, new_svi):
    x = torch.tensor(2.0)
    svi = new_svi(make, 1)
    expected = [svi.step(x) for _ in range(8)], pyro.param("loc").item()
    svi = new_svi(make, 5)
    losses = [svi.step(x) for _ in range(8)]
    assert all(isinstance(loss, torch.Tensor) and not loss.requires_grad for loss in losses)
    svi.read_losses()
    found = [loss.item() for loss in losses], pyro.param("loc").item()
    assert found == (pytest.approx(expected[0]), pytest.approx(expected[1]))


@EVERY_KIND
@pytest.mark.parametrize("name", ["Adam", "SGD", "ClippedAdam"])
def test_a_loss_that_is_not_finite_is_reported_and_its_step_left_out(make, name, new_svi):
    with pyro.validation_enabled(False):
        svi = new_svi(make, 4, getattr(pyro.optim, name)({"lr": 0.1}))
        svi.step(torch.tensor(2.0))
        svi.step(torch.tensor(2.0))
        before = pyro.param("loc").item()
        svi.step(torch.tensor(math.nan))
        after = pyro.param("loc").item()
        if name == "ClippedAdam":  # its momentum moves parameters without a gradient
            assert math.isfinite(after)
        else:
            assert after == before
        with pytest.raises(ValueError, match=r"loss of step 3 is nan, read after step 4"):
            svi.step(torch.tensor(2.0))
        assert math.isfinite(pyro.param("loc").item())
        svi.step(torch.tensor(2.0))
        svi.read_losses()


@EVERY_KIND
def test_a_run_has_all_losses_and_reads_them_rarely(make, new_svi):
    batches = [torch.tensor(float(i)) for i in range(5)]
    lengths = []
    svi = new_svi(make, 1)
    expected = svi.run(batches, num_epochs=3, progress_bar=False)
    svi = new_svi(make, 4)
    found = svi.run(
        batches,
        num_epochs=3,
        progress_bar=False,
        callback=lambda history: lengths.append(len(history.losses)),
    )
    assert found.losses == pytest.approx(expected.losses)
    assert all(type(loss) is float for loss in found.losses)
    assert found.epoch_losses == pytest.approx(expected.epoch_losses)
    assert lengths == [4, 5, 9, 10, 14, 15]


def test_a_run_stops_early_and_saves_its_losses(new_svi, tmp_path):
    svi = new_svi(EagerSVI, 3)
    history = svi.run(
        4,
        num_epochs=9,
        progress_bar=False,
        callback=EarlyStopping(1, evaluate=lambda: 0.0),
        args=(torch.tensor(1.0),),
        checkpoint=tmp_path / "run.pt",
        checkpoint_every=2,
    )
    assert history.is_converged
    assert len(history.losses) == 8
    again = new_svi(EagerSVI, 3)
    again.load(tmp_path / "run.pt", torch.tensor(1.0))
    assert again.history == history


def test_a_run_keeps_its_losses_after_an_error(new_svi):
    svi = new_svi(EagerSVI, 10)
    batches = [torch.tensor(1.0)] * 3 + [torch.tensor(math.nan)]
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="the loss of step 4 is nan"),
    ):
        svi.run(batches, progress_bar=False)
    assert all(map(math.isfinite, svi.history.losses[:3]))
    assert math.isnan(svi.history.losses[3])


def test_copies_have_settings_of_their_own(new_svi):
    svi = new_svi(EagerSVI, 3)
    svi.step(torch.tensor(1.0))
    other = copy.deepcopy(svi)
    svi.read_losses()
    assert len(other._unread.losses) == 1


def test_other_optimizers_get_gradients_of_zero():
    for optim in (pyro.optim.SGD({"lr": 1.0}), pyro.optim.ClippedAdam({"lr": 1.0})):
        pyro.clear_param_store()
        pyro.param("a", torch.zeros(2))
        ((_, param),) = pyro.get_param_store().named_parameters()
        param.grad = torch.ones(2)
        JointOptimizer(optim).step([param], torch.tensor(math.inf))
        assert param.tolist() == [0.0, 0.0]


@EVERY_KIND
@pytest.mark.parametrize("every", [0, 1.5], ids=str)
def test_the_number_of_steps_is_checked(make, every, new_svi):
    with pytest.raises((TypeError, ValueError), match="reads_loss_every"):
        new_svi(make, every)
