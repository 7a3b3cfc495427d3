"""Estimates of gradients, many at a time, and their means."""

import pyro
import torch
from torch import nn

from tests.statistics import assert_mean

F64 = {"dtype": torch.float64}


def gradient(elbo, model, guide, parameters, seed):
    """One estimate of the gradient of the bound in a list of tensors, as one vector."""
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return -torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def stored_parameters(elbo, model, guide):
    elbo.loss(model, guide)
    parameters = {}
    for program in (model, guide):
        if isinstance(program, nn.Module):
            parameters |= {id(p): p for p in program.parameters()}
    parameters |= {id(p): p for _, p in pyro.get_param_store().named_parameters()}
    return list(parameters.values())


def assert_same_mean(make, K, model, guide, rules=("pathwise", "dreg"), num_seeds=300, **options):
    """The same noise under both rules: the paired difference has mean zero."""
    elbos = [make(K, gradient=rule, **options) for rule in rules]
    parameters = stored_parameters(elbos[0], model, guide)
    draws = [
        torch.stack([gradient(elbo, model, guide, parameters, s) for s in range(num_seeds)])
        for elbo in elbos
    ]
    assert_mean(draws[1] - draws[0], 0.0)
    return draws


# Many replicates in one plate, each with parameters of its own, so that one step gives as many
# estimates of the gradient.
REPLICATES = 4000


def replicated(*values):
    return [torch.full((REPLICATES,), v, **F64).requires_grad_() for v in values]
