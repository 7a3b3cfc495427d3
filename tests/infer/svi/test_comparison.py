"""A checkpoint is compared with the run that continues from it, before anything changes."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.utils.data import DataLoader

from pyro_ext._digest import digest
from pyro_ext._random_states import random_states
from pyro_ext.infer import (
    CyclicalKL,
    EagerSVI,
    ImportanceWeightedELBO,
    JackknifeELBO,
    KLWeightedELBO,
    LinearKL,
    PartiallyImportanceWeightedELBO,
    VariationalRenyiELBO,
)


class OwnKL(LinearKL):
    """A schedule with a state of its own, which is no setting."""

    seen = 0

    def state_dict(self):
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
        super().load_state_dict({"num_steps_taken": state["num_steps_taken"]})

    def step(self):
        self.seen += 2
        super().step()


def rates(name):
    return {"lr": 0.1 if name == "loc" else 0.01}


def other_rates(name):
    return {"lr": 0.2 if name == "loc" else 0.01}


other_rates.__qualname__ = rates.__qualname__  # as after an edit of the function


def clips(module, name):
    return {"clip_norm": 1.0}


def a_loss(model, guide, *args):
    return Trace_ELBO().differentiable_loss(model, guide, *args)


def other_loss(model, guide, *args):
    return a_loss(model, guide, *args)


def weighted(elbo=None, schedule=None, sites="all"):
    return KLWeightedELBO(elbo or Trace_ELBO(), schedule or LinearKL(20), sites)


def adam(clip=None, **kwargs):
    return pyro.optim.Adam(kwargs, clip)


def make(optim=None, loss=None, dtype=torch.float32, constraint=constraints.positive):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(x=None):
        loc = pyro.param("loc", torch.tensor(0.0, dtype=dtype))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0) if x is None else x.sum())

    def guide(x=None):
        scale = pyro.param("scale", torch.tensor(0.9, dtype=dtype), constraint=constraint)
        pyro.sample("z", dist.Normal(0.5, scale))

    return EagerSVI(model, guide, optim or adam(lr=0.01), loss or ImportanceWeightedELBO(2))


#: name -> the settings of the saved run, those of the resumed run, and the differences
CHANGES = {
    "learning rate": (
        {"optim": adam(lr=0.01)},
        {"optim": adam(lr=0.1)},
        ["'optimizer.lr' is 0.1, but it was 0.01."],
    ),
    "a default": (
        {"optim": adam(lr=0.002, betas=(0.8, 0.9))},
        {"optim": adam()},
        [
            "'optimizer.lr' is 0.001, but it was 0.002.",
            "'optimizer.betas' is [0.9, 0.999], but it was [0.8, 0.9].",
        ],
    ),
    "clipping": (
        {"optim": adam()},
        {"optim": adam({"clip_norm": 2.0})},
        ["'optimizer.clip_norm' is 2.0, but it was None."],
    ),
    "a function that clips": (
        {"optim": adam({"clip_norm": 2.0})},
        {"optim": adam(clips)},
        [
            "'optimizer.clip_args' is 'clips', but it was None.",
            "'optimizer.clip_norm' is None, but it was 2.0.",
        ],
    ),
    "class of the optimiser": (
        {"optim": adam(lr=0.01)},
        {"optim": pyro.optim.SGD({"lr": 0.02})},
        ["'optimizer' is 'SGD', but it was 'Adam'."],
    ),
    "a function of the name": (
        {"optim": pyro.optim.Adam(rates)},
        {"optim": pyro.optim.Adam(other_rates)},
        ["'optimizer.lr[loc]' is 0.2, but it was 0.1."],
    ),
    "a function in place of a dict": (
        {"optim": adam(lr=0.3)},
        {"optim": pyro.optim.Adam(rates)},
        ["'optimizer.optim_args' is 'rates', but it was None."],
    ),
    "a scheduler": (
        {"optim": adam(lr=0.3)},
        {
            "optim": pyro.optim.StepLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.3}, "step_size": 3}
            )
        },
        ["'scheduler' is 'StepLR', but it was None."],
    ),
    "no scheduler": (
        {
            "optim": pyro.optim.StepLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.3}, "step_size": 3}
            )
        },
        {"optim": adam(lr=0.3)},
        ["'scheduler' is None, but it was 'StepLR'."],
    ),
    "number of particles": (
        {"loss": ImportanceWeightedELBO(2)},
        {"loss": ImportanceWeightedELBO(3)},
        ["'objective.num_particles' is 3, but it was 2."],
    ),
    "gradient and bound": (
        {"loss": JackknifeELBO(3, order=1)},
        {"loss": JackknifeELBO(3, order=2, gradient="dreg")},
        [
            "'objective.order' is 2, but it was 1.",
            "'objective.gradient' is 'dreg', but it was 'pathwise'.",
        ],
    ),
    "alpha": (
        {"loss": VariationalRenyiELBO(0.5)},
        {"loss": VariationalRenyiELBO(0.25)},
        ["'objective.alpha' is 0.25, but it was 0.5."],
    ),
    "bound of the guide": (
        {"loss": PartiallyImportanceWeightedELBO(4, 2)},
        {"loss": PartiallyImportanceWeightedELBO(4, 1)},
        ["'objective.guide_bound.num_groups' is 1, but it was 2."],
    ),
    "class of the objective": (
        {"loss": JackknifeELBO(2, order=1)},
        {"loss": ImportanceWeightedELBO(4)},
        ["'objective' is 'ImportanceWeightedELBO', but it was 'JackknifeELBO'."],
    ),
    "KL schedule": (
        {"loss": weighted(schedule=LinearKL(20))},
        {"loss": weighted(schedule=LinearKL(30, start=0.5))},
        [
            "'objective.schedule.num_steps' is 30, but it was 20.",
            "'objective.schedule.start' is 0.5, but it was 0.0.",
        ],
    ),
    "class of the KL schedule, and the ELBO inside": (
        {"loss": weighted(Trace_ELBO(), LinearKL(20))},
        {"loss": weighted(TraceMeanField_ELBO(num_particles=2), CyclicalKL(20))},
        [
            "'objective.num_particles' is 2, but it was 1.",
            "'objective.elbo' is 'TraceMeanField_ELBO', but it was 'Trace_ELBO'.",
            "'objective.schedule' is 'CyclicalKL', but it was 'LinearKL'.",
        ],
    ),
    "sites": (
        {"loss": weighted(sites=["z"])},
        {"loss": weighted(sites="all")},
        ["'objective.sites' is 'all', but it was ['z']."],
    ),
    "loss function": (
        {"loss": a_loss},
        {"loss": other_loss},
        ["'objective' is 'other_loss', but it was 'a_loss'."],
    ),
    "method of an ELBO": (
        {"loss": ImportanceWeightedELBO(2).differentiable_loss},
        {"loss": ImportanceWeightedELBO(5).differentiable_loss},
        ["'objective.num_particles' is 5, but it was 2."],
    ),
    "dtype": (
        {},
        {"dtype": torch.float64},
        [
            "'loc.dtype' is torch.float64, but it was torch.float32.",
            "'scale.dtype' is torch.float64, but it was torch.float32.",
        ],
    ),
    "constraint": (
        {},
        {"constraint": constraints.interval(0.0, 2.0)},
        [
            "'scale.constraint' is Interval(lower_bound=0.0, upper_bound=2.0), but it was "
            "GreaterThan(lower_bound=0.0)."
        ],
    ),
}


def everything(svi, data=None):
    store = pyro.get_param_store()
    return digest(
        [
            {name: x.detach().clone() for name, x in store.named_parameters()},
            svi.optim.get_state(),
            svi.history.state_dict(),
            getattr(getattr(svi.objective, "schedule", None), "num_steps_taken", None),
            random_states(data),
        ]
    )


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("has_run", [False, True])
def test_every_difference_is_named_and_can_be_overruled(name, has_run, tmp_path):
    saved, now, differences = CHANGES[name]
    svi = make(**saved)
    svi.run(4, 1, False, checkpoint=tmp_path / "run")
    svi = make(**now)
    if has_run:
        svi.run(1, 1, False)
    before = everything(svi)
    with pytest.raises(ValueError, match="does not fit this run") as caught:
        svi.run(4, 2, False, resume=tmp_path / "run")
    header, *found, advice = str(caught.value).splitlines()
    assert sorted(found) == sorted(differences)
    assert header == f"Checkpoint: {tmp_path / 'run'} does not fit this run."
    names = [line.split("'")[1] for line in found]
    assert advice.endswith(f"allow_changes={names}.")
    assert everything(svi) == before
    assert (pyro.get_param_store().keys() != set()) == has_run
    svi.run(4, 2, False, resume=tmp_path / "run", allow_changes=names, checkpoint=tmp_path / "new")
    assert len(svi.history.losses) == 8
    svi = make(**now)  # the new checkpoint has the new settings
    svi.run(4, 3, False, resume=tmp_path / "new", allow_changes=names)
    assert len(svi.history.losses) == 12


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({"optim": adam()}, {"optim": adam(lr=1e-3, betas=(0.9, 0.999))}),
        ({"optim": adam(lr=1e-3)}, {"optim": adam(lr=np.float64(1e-3), amsgrad=False)}),
        ({"optim": pyro.optim.Adam(rates)}, {"optim": pyro.optim.Adam(rates)}),
        ({"loss": weighted(schedule=OwnKL(3))}, {"loss": weighted(schedule=OwnKL(3))}),
        ({"loss": a_loss}, {"loss": a_loss}),
        ({"loss": functools.partial(a_loss)}, {"loss": functools.partial(a_loss)}),
        (
            {"loss": ImportanceWeightedELBO(2)},
            {"loss": ImportanceWeightedELBO(2, max_plate_nesting=2)},
        ),
    ],
)
def test_equal_settings_are_no_difference(saved, now, tmp_path):
    svi = make(**saved)
    svi.run(4, 1, False, checkpoint=tmp_path / "run")
    svi = make(**now)
    assert len(svi.run(4, 2, False, resume=tmp_path / "run").losses) == 8


def test_an_overruled_learning_rate_takes_effect(tmp_path):
    svi = make()
    svi.run(4, 1, False, checkpoint=tmp_path / "run")
    for optim, rate in [(adam(lr=0.3), 0.3), (pyro.optim.Adam(other_rates), 0.2)]:
        svi = make(optim=optim)
        svi.load(tmp_path / "run", allow_changes=["optimizer"])
        state = svi.optim.get_state()["loc"]
        assert state["param_groups"][0]["lr"] == rate
        assert state["state"][0]["step"] == 4
        before = pyro.param("loc").item()
        svi.step()
        assert abs(pyro.param("loc").item() - before) > rate / 4


def test_a_parameter_keeps_its_value_under_another_constraint(tmp_path):
    svi = make()
    svi.run(4, 1, False, checkpoint=tmp_path / "run")
    value = pyro.param("scale").item()
    svi = make(constraint=constraints.softplus_positive)
    svi.load(tmp_path / "run", allow_changes=["scale.constraint"])
    assert pyro.param("scale").item() == pytest.approx(value, rel=1e-6)
    assert svi.optim.get_state()["scale"]["state"] == {}
    svi = make(constraint=constraints.interval(0.85, 0.9))
    with pytest.raises(ValueError, match="The value of 'scale' cannot get the constraint Interval"):
        svi.load(tmp_path / "run", allow_changes=["scale.constraint"])
    assert len(pyro.get_param_store()) == 0


def test_the_length_of_the_loader_is_compared(tmp_path):
    def loader(batch_size, **kwargs):
        return DataLoader(torch.randn(12), batch_size=batch_size, **kwargs)

    svi = make()
    svi.run(loader(4), 1, False, checkpoint=tmp_path / "run")
    generator = torch.Generator().manual_seed(3)
    other = loader(3, generator=generator, shuffle=True)
    svi = make()
    before = everything(svi, other)
    with pytest.raises(ValueError, match=r"'loader.length' is 4, but it was 3") as caught:
        svi.run(other, 2, False, resume=tmp_path / "run")
    assert "'loader.generators' is 1, but it was 0" in str(caught.value)
    assert everything(svi, other) == before
    svi.run(loader(3), 2, False, resume=tmp_path / "run", allow_changes=["loader.length"])
    svi.load(tmp_path / "run", torch.randn(5))  # does not compare loaders


def test_wrong_names_are_refused(tmp_path):
    svi = make()
    svi.run(4, 1, False, checkpoint=tmp_path / "run")
    for names in ["optimizer.l"], ["optimizer.lr", "lr"], ["optimizer.lr.x"]:
        svi = make(adam(lr=0.5))
        with pytest.raises(
            ValueError, match=f"allow_changes has \\['{names[-1]}'\\], but the names"
        ):
            svi.load(tmp_path / "run", allow_changes=names)
    for names in "optimizer.lr", [3]:
        with pytest.raises(TypeError, match="allow_changes must be a list of names"):
            svi.run(3, 1, False, allow_changes=names)
    svi.load(tmp_path / "run", allow_changes=("optimizer", "objective.gradient"))


def test_a_nan_is_equal_to_a_nan(tmp_path):
    class WithNaN(ImportanceWeightedELBO):
        def __init__(self):
            super().__init__(2)
            self.level = math.nan

    svi = make(loss=WithNaN())
    svi.run(4, 1, False, checkpoint=tmp_path / "run")
    make(loss=WithNaN()).load(tmp_path / "run")
