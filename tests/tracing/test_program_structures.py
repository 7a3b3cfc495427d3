"""Every structure of programs that Pyro's Trace_ELBO takes, and those that it refuses.

With several particles, only a subsampled plate around some of the sites is refused beyond those.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LatentStableReparam
from pyro.infer.util import torch_item
from pyro.ops.indexing import Vindex

from tests.registry import ESTIMATORS

STRUCTURES = {}
REFUSED = {}


def bernoulli(name, *shape, p=None):
    p = torch.tensor(0.4) if p is None else p
    return pyro.sample(name, dist.Bernoulli(p).expand([*shape]) if shape else dist.Bernoulli(p))


def probability():
    return pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)


def structure(*arguments, joint_subsample=lambda *argument: False, refused=None):
    """Registers a builder of (model, guide), once for each of its arguments.

    :param joint_subsample: whether a plate around some sites only is subsampled.
    :param str refused: the error of Trace_ELBO, if it refuses the pair.
    """

    def register(build):
        for argument in arguments or ((),):
            name = "-".join([build.__name__, *map(str, argument)])
            if refused is None:
                STRUCTURES[name] = (build, argument, joint_subsample(*argument))
            else:
                REFUSED[name] = (build, argument, refused)
        return build

    return register


def is_subsampled(size):
    return size is not None


@structure()
def nothing():
    return (lambda: None), (lambda: None)


@structure()
def data_only():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=torch.zeros(2))

    return model, lambda: None


@structure((True,), (False,))
def with_or_without_rsample(has_rsample):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.clamp(0.0, 0.1), 1.0), obs=torch.tensor(0.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, 1.0).has_rsample_(has_rsample))

    return model, guide


@structure((None,), (2,), joint_subsample=is_subsampled)
def sequential_plate(size):
    def program(p=None):
        for i in pyro.plate("plate", 4, size):
            bernoulli(f"x{i}", p=p)

    return program, lambda: program(probability())


@structure((None,), (2,), joint_subsample=is_subsampled)
def nested_sequential_plates_in_either_order(size):
    def program(p=None, swapped=False):
        plates = pyro.plate("outer", 3, size), pyro.plate("inner", 3, size)
        for i in plates[swapped]:
            for j in plates[not swapped]:
                names = (j, i) if swapped else (i, j)
                bernoulli("x{}{}".format(*names), p=p)

    return program, lambda: program(probability(), swapped=True)


@structure((None,), (5,))
def sequential_plate_in_the_model_only(size):
    def model():
        for _ in pyro.plate("plate", 10, size):
            pass
        bernoulli("x")

    return model, lambda: bernoulli("x", p=probability())


@structure((None,), (5,))
def plate(size):
    def program(p=None):
        with pyro.plate("plate", 10, size):
            bernoulli("x", p=p)

    return program, lambda: program(probability())


@structure()
def plate_without_a_size():
    def program(p=None):
        with pyro.plate("plate"):
            bernoulli("x", 10, p=p)

    return program, lambda: program(probability())


@structure((None,), (5,))
def parameters_and_data_cut_to_the_subsample(size):
    def model():
        with pyro.plate("plate", 10, size):
            bernoulli("x")

    def guide():
        with pyro.plate("plate", 10, size) as index:
            whole = pyro.param("whole", torch.tensor(0.5), event_dim=0)
            assert whole.shape == ()
            assert pyro.subsample(torch.ones(10), event_dim=0).shape == (len(index),)
            p = pyro.param("p", torch.full((10,), 0.5), event_dim=0)
            assert p.shape == (len(index),)
            bernoulli("x", p=p)

    return model, guide


@structure(joint_subsample=lambda: True)
def sequential_plate_in_a_plate():
    def program(p=None):
        with pyro.plate("plate", 3, 2):
            for i in pyro.plate("sequential", 3, 2):
                bernoulli(f"x{i}", p=p)

    return program, lambda: program(probability())


@structure(joint_subsample=lambda: True)
def plate_in_a_sequential_plate():
    def program(p=None):
        inner = pyro.plate("plate", 3, 2)
        for i in pyro.plate("sequential", 3, 2):
            with inner:
                bernoulli(f"x{i}", p=p)

    return program, lambda: program(probability())


@structure(joint_subsample=lambda: True)
def plates_at_different_depths():
    def program(p=None):
        inner = pyro.plate("inner", 10, 5)
        for i in pyro.plate("first", 2):
            bernoulli(f"x{i}", p=p)
            if i == 0:
                for j in pyro.plate("second", 2):
                    with inner:
                        bernoulli(f"y{j}", p=p)
            else:
                with inner:
                    bernoulli("z", p=p)

    return program, lambda: program(probability())


@structure(((3,),), ((3, 4),), ((3, 4, 5),))
def stack_of_plates_around_one(sizes):
    def program(p=None):
        with pyro.plate_stack("stack", sizes), pyro.plate("plate", 7):
            assert bernoulli("x", p=p).shape[-1 - len(sizes) :] == (7, *sizes)

    return program, lambda: program(probability())


@structure(joint_subsample=lambda: True)
def site_between_nested_plates():
    def model():
        with pyro.plate("outer", 10, 5):
            bernoulli("x")
            with pyro.plate("inner", 11, 6):
                bernoulli("y")

    def guide():
        assert pyro.param("p0", torch.full((4, 5), 0.5), event_dim=2).shape == (4, 5)
        with pyro.plate("outer", 10, 5):
            assert pyro.param("p1", torch.full((10, 3), 0.5), event_dim=1).shape == (5, 3)
            bernoulli("x", p=pyro.param("px", torch.full((10,), 0.5), event_dim=0))
            with pyro.plate("inner", 11, 6):
                bernoulli("y", p=pyro.param("py", torch.full((11, 10), 0.5), event_dim=0))

    return model, guide


@structure(joint_subsample=lambda: True)
def crossed_plates_used_again():
    def program(p=None):
        rows, columns = pyro.plate("rows", 11, 6, dim=-2), pyro.plate("columns", 10, 5, dim=-1)
        with columns:
            bernoulli("x", p=p)
        with rows:
            bernoulli("y", p=p)
        with rows, columns:
            bernoulli("z", p=p)

    return program, lambda: program(probability())


@structure(joint_subsample=lambda: True)
def plates_side_by_side():
    def program(p=None):
        with pyro.plate("first", 10, 5):
            bernoulli("x", p=p)
        with pyro.plate("second", 11, 6):
            bernoulli("y", p=p)

    return program, lambda: program(probability())


@structure(joint_subsample=lambda: True)
def dims_allocated_around_a_fixed_one():
    def program(p=None):
        with pyro.plate("outer", 10, 5, dim=-3):
            assert bernoulli("x", p=p).shape[-3:] == (5, 1, 1)
            with pyro.plate("first", 11, 6):
                assert bernoulli("y", p=p).shape[-3:] == (5, 1, 6)
                with pyro.plate("second", 12, 7):
                    assert bernoulli("z", p=p).shape[-3:] == (5, 7, 6)
                    with pyro.plate("third", 13, 8):
                        assert bernoulli("q", p=p).shape[-4:] == (8, 5, 7, 6)

    return program, lambda: program(probability())


@structure()
def plates_of_components_and_data_within_another():
    def model():
        with pyro.plate("outer", 10, dim=-3), pyro.plate("components", 2, dim=-1):
            p = pyro.sample("p", dist.Beta(1.1, 1.1))
            with pyro.plate("data", 20, dim=-2):
                pyro.sample("x", dist.Bernoulli(p), obs=torch.ones(20, 2))

    def guide():
        with pyro.plate("outer", 10, dim=-3), pyro.plate("components", 2, dim=-1):
            pyro.sample("p", dist.Beta(1.1, 1.1))

    return model, guide


def normal_guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


@structure((True,), (False,), (torch.tensor(True),), (torch.tensor(False),))
def masked_data(mask):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return model, normal_guide


@structure((1,), (0.1,), (torch.tensor(0.5),))
def scaled_data(scale):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return model, normal_guide


@structure(
    ({"mask": True},),
    ({"mask": False},),
    ({"mask": torch.tensor([False, True])},),
    ({"scale": 0.1},),
    ({"scale": torch.tensor([0.1, 0.9])},),
)
def masked_or_scaled_plate_of_event_data(kwargs):
    handler = poutine.mask if "mask" in kwargs else poutine.scale
    data = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])

    def model():
        c = pyro.sample("c", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 2), handler(**kwargs):
            pyro.sample("x", dist.Dirichlet(c), obs=data)

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("c", dist.LogNormal(loc, 1.0).to_event(1))

    return model, guide


@structure()
def reparameterized_stable_with_deltas():
    @poutine.reparam(config={"z": LatentStableReparam()})
    def model():
        stability = pyro.sample("stability", dist.Uniform(0.0, 2.0))
        z = pyro.sample("z", dist.Stable(stability, 0.1))
        pyro.sample("x", dist.Poisson(z.abs()), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("stability", dist.Delta(torch.tensor(1.5)))
        pyro.sample("z_uniform", dist.Delta(torch.tensor(0.1)))
        pyro.sample("z_exponential", dist.Delta(torch.tensor(1.0)))

    return model, guide


@structure()
def discrete_index_into_parameters():
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])

    def model():
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Categorical(Vindex(weights)[k]), obs=torch.tensor([0, 1, 1, 0]))

    def guide():
        logits = pyro.param("logits", torch.zeros(4, 3))
        with pyro.plate("data", 4):
            pyro.sample("k", dist.Categorical(logits=logits))

    return model, guide


@structure(refused="missing from the guide|not in guide|guide")
def latent_missing_from_the_guide():
    return (lambda: bernoulli("x")), (lambda: None)


@structure(refused="Multiple sample sites named")
def twice_the_same_name_in_the_model():
    return (lambda: (bernoulli("x"), bernoulli("x"))), (lambda: bernoulli("x"))


@structure(refused="Multiple sample sites named")
def twice_the_same_name_in_the_guide():
    return (lambda: bernoulli("x")), (lambda: (bernoulli("x"), bernoulli("x")))


@structure(refused="Multiple sample sites named")
def one_name_in_a_sequential_plate():
    def program():
        for _ in pyro.plate("plate", 2):
            bernoulli("x")

    return program, program


@structure(
    ((1, 2), 1, (2, 1), 2, "event_dims|invalid log_prob shape"),
    ((1, 2), 2, (2, 1), 2, "shapes"),
    refused="disagree|invalid log_prob shape",
)
def shapes_that_differ(in_model, model_dims, in_guide, guide_dims, _):
    def program(shape, dims):
        return lambda: pyro.sample("x", dist.Normal(torch.zeros(shape), 1.0).to_event(dims))

    return program(in_model, model_dims), program(in_guide, guide_dims)


@structure(((5,),), ((3, 5),), refused="invalid shape of pyro.param")
def parameter_of_a_wrong_size_for_its_plate(shape):
    def model():
        with pyro.plate("plate", 10):
            bernoulli("x")

    def guide():
        with pyro.plate("plate", 10):
            pyro.param("p0", torch.ones(shape), event_dim=0)
            bernoulli("x")

    return model, guide


@structure((None,), (5,), refused="Found plate statements in guide but not model")
def plate_in_the_guide_only(size):
    def guide():
        for _ in pyro.plate("plate", 10, size):
            pass
        bernoulli("x")

    return (lambda: bernoulli("x")), guide


@structure(refused="Shape mismatch inside plate")
def batch_of_a_wrong_size_for_its_plate():
    def program():
        with pyro.plate("plate", 10, 5):
            bernoulli("x", 2)

    return program, program


@structure(
    ((5,), (6,), (5, 6)),
    ((5, 1), (5,), (5, 6)),
    ((5, 1), (6,), (6, 1)),
    ((5, 1), (6,), (5, 5)),
    refused="invalid log_prob shape|hape mismatch",
)
def batches_of_wrong_sizes_in_nested_plates(x, y, z):
    def program():
        with pyro.plate("outer", 10, 5):
            bernoulli("x", *x)
            with pyro.plate("inner", 11, 6):
                bernoulli("y", *y)
                bernoulli("z", *z)

    return program, program


@structure(refused="collide at dim=")
def plates_at_one_dim():
    def program():
        with pyro.plate("outer", 10, 5, dim=-2):
            bernoulli("x")
            with pyro.plate("first", 11, 6), pyro.plate("second", 12, 7, dim=-1):
                bernoulli("y")

    return program, program


def step(elbo, model, guide):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-6}), elbo)
    assert isinstance(svi.step(), float)
    pyro.set_rng_seed(0)
    loss = elbo.loss(model, guide)
    for method in (elbo.differentiable_loss, elbo.loss_and_grads):
        pyro.set_rng_seed(0)
        assert torch_item(method(model, guide)) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    return loss


@pytest.mark.parametrize(("build", "argument", "joint"), STRUCTURES.values(), ids=STRUCTURES)
def test_one_particle_takes_all_that_trace_elbo_takes(build, argument, joint):
    model, guide = build(*argument)
    expected = step(Trace_ELBO(), model, guide)
    for make, smallest in ESTIMATORS.values():
        if smallest == 1:
            pyro.clear_param_store()
            assert step(make(1), model, guide) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.filterwarnings("ignore:Plate .* holds all the data")
@pytest.mark.parametrize(("build", "argument", "joint"), STRUCTURES.values(), ids=STRUCTURES)
def test_several_particles_refuse_only_a_subsample_inside_of_the_bound(
    build, argument, joint, vectorize
):
    model, guide = build(*argument)
    for make, smallest in ESTIMATORS.values():
        pyro.clear_param_store()
        elbo = make(max(2, smallest), vectorize_particles=vectorize)
        if joint:
            with pytest.raises(ValueError, match="is subsampled"):
                elbo.loss_and_grads(model, guide)
        else:
            step(elbo, model, guide)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize(("build", "argument", "refused"), REFUSED.values(), ids=REFUSED)
def test_what_trace_elbo_refuses_is_refused(build, argument, refused, K):
    errors = (ValueError, RuntimeError, UserWarning, KeyError, NotImplementedError)
    model, guide = build(*argument)
    make, _ = ESTIMATORS["importance-weighted"]
    for elbo in (Trace_ELBO(), make(K, vectorize_particles=False)):
        pyro.clear_param_store()
        with pytest.raises(errors, match=refused):
            SVI(model, guide, pyro.optim.Adam({"lr": 1e-6}), elbo).step()
