"""Programs of every structure are taken and refused as by Pyro's Trace_ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.util import torch_item

from tests.registry import ESTIMATORS
from tests.tracing.structures import REFUSED, STRUCTURES, bernoulli, structure


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


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.parametrize(("build", "argument", "joint"), STRUCTURES.values(), ids=STRUCTURES)
def test_one_particle_takes_all_that_trace_elbo_takes(build, argument, joint):
    model, guide = build(*argument)
    expected = step(Trace_ELBO(), model, guide)
    for make, smallest in ESTIMATORS.values():
        if smallest == 1:
            pyro.clear_param_store()
            assert step(make(1), model, guide) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.sampled
@pytest.mark.long
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
        if joint and not elbo.is_linear:
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
