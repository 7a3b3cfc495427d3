"""Constraints of torch and Pyro are held by a file; those of users are held by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import ExpTransform

from pyro_ext._files import read_file, write_file
from pyro_ext.infer import EagerSVI
from pyro_ext.infer.svi.plain_constraints import decode, describe_constraint, encode, is_same

PLAIN = [
    name
    for name in constraints.__all__
    if isinstance(getattr(constraints, name), constraints.Constraint) and "dependent" not in name
]
COMPOSED = {
    "interval": constraints.interval(-1.5, torch.tensor([2.0, 3.0])),
    "greater_than": constraints.greater_than(0.1),
    "half_open_interval": constraints.half_open_interval(0.0, 2.0),
    "integer_interval": constraints.integer_interval(0, 4),
    "less_than": constraints.less_than(torch.tensor(3.0, requires_grad=True)),
    "multinomial": constraints.multinomial(5),
    "independent": constraints.independent(constraints.interval(0.0, 2.0), 1),
    "stack": constraints.stack([constraints.positive, constraints.unit_interval], -1),
    "cat": constraints.cat([constraints.positive, constraints.simplex], -1, [1, 3]),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(0.0, torch.tensor([1.0, 2.0]))
    ).support,
}


class Own(constraints.Constraint):
    """A constraint of a user's own."""

    def check(self, value):
        return value > 0


class Renamed(type(constraints.positive)):
    """A constraint of a user's own, with the name and the arguments of one of torch."""


Renamed.__name__ = Renamed.__qualname__ = "_GreaterThan"


for registry in (biject_to, transform_to):
    registry.register(Own, lambda constraint: ExpTransform())


def through_a_file(encoded, tmp_path):
    write_file(tmp_path / "constraint", "test", 1, {"constraint": encoded})
    return read_file(tmp_path / "constraint", "test", 1)["constraint"]


@pytest.mark.parametrize("name", [*PLAIN, *COMPOSED])
def test_constraints_of_the_libraries_are_held_by_a_file(name, tmp_path):
    constraint = COMPOSED.get(name) or getattr(constraints, name)
    encoded = through_a_file(encode(constraint), tmp_path)
    again = decode(encoded)
    assert type(again) is type(constraint)
    assert is_same(encode(again), encode(constraint))
    assert (again.event_dim, again.is_discrete) == (constraint.event_dim, constraint.is_discrete)
    assert describe_constraint(encoded)
    others = [encode(x) for key, x in COMPOSED.items() if key != name]
    assert not any(is_same(encoded, other) for other in others)
    try:
        transform = transform_to(constraint)
    except NotImplementedError:
        return
    x = torch.randn(2, 6, 6)[..., :4] if name in ("stack", "cat") else torch.randn(3, 2, 2)
    try:
        expected = transform(x)
    except Exception:  # of another shape
        return
    assert torch.equal(transform_to(again)(x), expected)


@pytest.mark.parametrize(
    "constraint",
    [
        Own(),
        Renamed(0.0),
        constraints.independent(Own(), 1),
        constraints.greater_than(object()),
    ],
)
def test_other_constraints_are_held_by_name(constraint, tmp_path):
    encoded = through_a_file(encode(constraint), tmp_path)
    assert encoded == {"library": None, "name": type(constraint).__qualname__}
    assert decode(encoded) is None
    assert not is_same(encoded, encode(constraints.greater_than(0.0)))


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("builtins", "eval"),
        ("torch.distributions.constraints", "torch"),
        ("torch.distributions.constraints", "is_dependent"),
        ("pyro.distributions.constraints", "__dict__"),
    ],
)
def test_only_constraints_are_looked_up(library, name):
    assert decode({"library": library, "name": name, "attributes": {}}) is None


def test_a_parameter_with_a_constraint_of_ones_own(tmp_path):
    def model(is_early=True):
        pass

    def guide(is_early=True):
        if is_early:
            pyro.param("scale", torch.tensor(2.0), constraint=Own())
        pyro.param("loc", torch.tensor(2.0))

    def make():
        pyro.clear_param_store()
        return EagerSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO())

    svi = make()
    svi.step()
    svi.save(tmp_path / "run")
    svi = make()
    svi.load(tmp_path / "run")
    assert pyro.param("scale").item() == pytest.approx(2.0)
    svi = make()
    with pytest.raises(ValueError, match="a file does not hold its constraint Own, which is not"):
        svi.load(tmp_path / "run", is_early=False)
    assert len(pyro.get_param_store()) == 0
    pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pytest.raises(ValueError, match=r"'scale.constraint' is GreaterThan\(.*, but it was Own"):
        svi.load(tmp_path / "run", is_early=False)


def test_a_parameter_that_does_not_exist_yet_gets_its_constraint(tmp_path):
    def guide(is_early=True):
        if is_early:
            pyro.param("scale", torch.tensor(1.5), constraint=constraints.interval(1.0, 3.0))

    svi = EagerSVI(lambda **kwargs: None, guide, pyro.optim.Adam({}), Trace_ELBO())
    svi.step()
    svi.save(tmp_path / "run")
    pyro.clear_param_store()
    svi.load(tmp_path / "run", is_early=False)
    assert pyro.param("scale").item() == pytest.approx(1.5)
    assert pyro.get_param_store()["scale"].requires_grad
