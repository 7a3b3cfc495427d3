"""The tables of program structures, and how to add one."""

import pyro
import pyro.distributions as dist
import torch

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
