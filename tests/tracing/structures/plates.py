"""Structures of plates that Trace_ELBO takes."""

import pyro
import pyro.distributions as dist
import torch

from tests.tracing.structures.registry import bernoulli, is_subsampled, probability, structure


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
