"""A run steps Pyro's learning-rate schedulers, and resumes them to the last bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ext.infer import EagerSVI

#: The arguments of each scheduler of torch that takes an optimiser.
SCHEDULERS = {
    "ConstantLR": {"total_iters": 30},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "LinearLR": {"total_iters": 30},
    "MultiStepLR": {"milestones": [2, 4], "gamma": 0.5},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
    "PolynomialLR": {"total_iters": 6, "power": 2.0},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 9.0, "threshold_mode": "abs"},
    "StepLR": {"step_size": 2, "gamma": 0.5},
}


def model(is_late=False):
    loc = pyro.param("loc", torch.tensor(0.0))
    if is_late:
        loc = loc + pyro.param("late", torch.tensor(0.1))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(2.0))


def guide(is_late=False):
    pass


def make(name, lr=0.05, optimizer=torch.optim.Adam, **kwargs):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    arguments = {"optimizer": optimizer, "optim_args": {"lr": lr}, **SCHEDULERS[name], **kwargs}
    optim = getattr(pyro.optim, name)(arguments)
    return EagerSVI(model, guide, optim, Trace_ELBO())


def rates(svi):
    """The learning rates of the parameters, and the numbers of steps of their schedulers."""
    found = {}
    for param, scheduler in svi.optim.optim_objs.items():
        name = pyro.get_param_store().param_name(param)
        found[name] = scheduler.optimizer.param_groups[0]["lr"], scheduler.last_epoch
    return found


def stop_after(num_steps):
    return lambda history: len(history.losses) == num_steps


def test_the_table_has_all_schedulers():
    module = torch.optim.lr_scheduler
    subclasses = {
        name
        for name, x in vars(module).items()
        if isinstance(x, type) and issubclass(x, module.LRScheduler) and name[0] != "_"
    }
    # These take no optimiser, or schedulers of it, as an argument.
    others = {"LRScheduler", "ChainedScheduler", "SequentialLR"}
    assert subclasses - others <= SCHEDULERS.keys() | {"ReduceLROnPlateau"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("step_scheduler", ["epoch", "step"])
def test_a_resumed_scheduler_equals_an_uninterrupted_one(name, step_scheduler, tmp_path):
    options = {"step_scheduler": step_scheduler, "progress_bar": False}
    svi = make(name)
    expected = svi.run(3, 6, **options).losses, rates(svi)
    assert expected[1]["loc"][1] == (6 if step_scheduler == "epoch" else 18)
    assert expected[1]["loc"][0] != 0.05 or name == "CosineAnnealingWarmRestarts"
    svi = make(name)
    svi.run(3, 6, callback=stop_after(8), checkpoint=tmp_path / "run", **options)
    svi = make(name)
    assert svi.run(3, 6, resume=tmp_path / "run", **options).losses == expected[0]
    assert rates(svi) == expected[1]


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # which torch 2.6 passes to itself
def test_a_composed_scheduler_is_resumed(tmp_path):
    def warm_up(optimizer):
        module = torch.optim.lr_scheduler
        parts = [module.LinearLR(optimizer, 0.1, 1.0, 2), module.MultiStepLR(optimizer, [1, 2])]
        return module.SequentialLR(optimizer, parts, [2])

    def fresh():
        pyro.clear_param_store()
        arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}}
        return EagerSVI(model, guide, pyro.optim.PyroLRScheduler(warm_up, arguments), Trace_ELBO())

    svi = fresh()
    expected = svi.run(2, 6, False).losses, rates(svi)
    svi = fresh()
    svi.run(2, 6, False, stop_after(3), checkpoint=tmp_path / "run")
    svi = fresh()
    assert svi.run(2, 6, False, resume=tmp_path / "run").losses == expected[0]
    assert rates(svi) == expected[1]


def test_the_user_can_step_the_scheduler():
    svi = make("ExponentialLR")
    svi.run(3, 2, False, step_scheduler=None)
    assert rates(svi)["loc"] == (0.05, 0)
    with pytest.raises(ValueError, match="step_scheduler must be 'epoch', 'step' or None, but it"):
        svi.run(3, step_scheduler="batch")


@pytest.mark.parametrize("step_scheduler", ["epoch", "step"])
def test_a_second_step_by_the_user_is_noticed(step_scheduler):
    svi = make("ExponentialLR")

    def callback(history):
        if history.is_epoch_end:
            svi.optim.step()

    with pytest.warns(UserWarning, match="scheduler was also stepped elsewhere, perhaps") as caught:
        svi.run(3, 4, False, callback, step_scheduler=step_scheduler)
    assert len(caught) == 1
    svi.run(3, 4, False, callback, step_scheduler=None)
    svi.run(3, 4, False, step_scheduler=step_scheduler)


def test_data_without_a_length_has_epochs_too():
    class Stream:
        def __iter__(self):
            return iter([()] * 3)

    svi = make("StepLR", step_size=1)
    svi.run(Stream(), 2, False)
    assert rates(svi)["loc"] == (0.05 * 0.25, 2)


def test_plateaus_are_those_of_the_mean_loss_of_an_epoch():
    svi = make("ReduceLROnPlateau", lr=1e-8, threshold=0.0)
    history = svi.run(3, 4, False)
    scheduler = next(iter(svi.optim.optim_objs.values()))
    assert scheduler.best == min(history.epoch_losses)
    svi = make("ReduceLROnPlateau", lr=1e-8, threshold=0.0)
    history = svi.run(3, 4, False, step_scheduler="step")
    assert next(iter(svi.optim.optim_objs.values())).best == min(history.losses)


def test_the_scheduler_of_a_parameter_that_rests_goes_on(tmp_path):
    """The last epochs of the resumed run use no parameter named "late"."""

    def data():
        return [(True,), (False,)]

    svi = make("ExponentialLR")
    svi.run(data(), 1, False)
    svi.run(2, 3, False)  # two more runs, to compare with
    expected = rates(svi)
    assert expected["late"][1] == 4
    svi = make("ExponentialLR")
    svi.run(data(), 1, False)
    svi.run(2, 3, False, stop_after(4), checkpoint=tmp_path / "run")
    svi = make("ExponentialLR")
    svi.run(2, 3, False, resume=tmp_path / "run")
    assert rates(svi) == expected


@pytest.mark.parametrize(
    "name", sorted(SCHEDULERS.keys() - {"ReduceLROnPlateau", "CyclicLR", "OneCycleLR"})
)
def test_an_overruled_learning_rate_takes_effect(name, tmp_path):
    """It is the rate that a run with the new setting would have by now."""
    svi = make(name, lr=0.01)
    svi.run(3, 3, False)
    expected = rates(svi)
    svi = make(name, lr=0.05)
    svi.run(3, 3, False, checkpoint=tmp_path / "run")
    moments = {
        n: p.clone() for n, p in svi.optim.get_state()["loc"]["optimizer"]["state"][0].items()
    }
    svi = make(name, lr=0.01)
    with pytest.raises(ValueError, match=r"'optimizer.lr' is 0.01, but it was 0.05"):
        svi.load(tmp_path / "run")
    svi.load(tmp_path / "run", allow_changes=["optimizer.lr"])
    assert rates(svi) == expected
    found = svi.optim.get_state()["loc"]["optimizer"]["state"][0]
    assert all(torch.equal(found[key], x) for key, x in moments.items())


def test_an_overruled_setting_of_a_scheduler_takes_effect(tmp_path):
    svi = make("StepLR", step_size=1)
    svi.run(3, 4, False)
    expected = rates(svi)
    svi = make("StepLR")
    svi.run(3, 4, False, checkpoint=tmp_path / "run")
    svi = make("StepLR", step_size=1)
    with pytest.raises(ValueError, match=r"'scheduler.step_size' is 1, but it was 2"):
        svi.load(tmp_path / "run")
    svi.load(tmp_path / "run", allow_changes=["scheduler"])
    assert rates(svi) == expected


def test_overruled_settings_of_a_plateau(tmp_path):
    svi = make("ReduceLROnPlateau", lr=1e-8, threshold=0.0)
    svi.run(3, 4, False, checkpoint=tmp_path / "run")
    old = next(iter(svi.optim.optim_objs.values()))
    svi = make("ReduceLROnPlateau", lr=0.5, patience=7, threshold=0.0)
    svi.load(tmp_path / "run", allow_changes=["optimizer.lr", "scheduler.patience"])
    new = next(iter(svi.optim.optim_objs.values()))
    assert (new.patience, new.best, new.last_epoch) == (7, old.best, old.last_epoch)
    assert new.optimizer.param_groups[0]["lr"] == 0.5


def test_a_scheduler_that_cannot_go_on_is_refused(tmp_path):
    svi = make("OneCycleLR")
    svi.run(3, 10, False, checkpoint=tmp_path / "run")
    svi = make("OneCycleLR", total_steps=5)
    with pytest.raises(ValueError, match="cannot continue from the state of 'loc': Tried to step"):
        svi.load(tmp_path / "run", allow_changes=["scheduler.total_steps"])
    assert len(pyro.get_param_store()) == 0
    assert svi.history.losses == []


def test_when_the_scheduler_steps_is_compared(tmp_path):
    svi = make("StepLR")
    svi.run(3, 4, False, checkpoint=tmp_path / "run")
    svi = make("StepLR")
    with pytest.raises(ValueError, match="'step_scheduler' is 'step', but it was 'epoch'"):
        svi.run(3, 5, False, resume=tmp_path / "run", step_scheduler="step")


class Holder(torch.optim.SGD):
    """An optimiser whose state holds an object, from the start or after the first step."""

    fails = "first"

    def step(self, closure=None):
        super().step(closure)
        param = self.param_groups[0]["params"][0]
        if self.fails == "first" or param.shape == ():
            self.state[param]["held"] = object()


@pytest.mark.parametrize(("fails", "num_steps"), [("first", 0), ("later", 1)])
def test_a_state_that_a_file_cannot_hold_is_found_at_once(fails, num_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(Holder, "fails", fails)
    pyro.clear_param_store()
    svi = EagerSVI(model, guide, pyro.optim.PyroOptim(Holder, {"lr": 0.1}), Trace_ELBO())
    with pytest.raises(TypeError, match=r"states\[.*\]\['held'\] is of type object, which a file"):
        svi.run(100, 2, False, checkpoint=tmp_path / "run")
    assert len(svi.history.losses) == num_steps
    assert list(tmp_path.iterdir()) == []
