"""Training loops of the module form, under DistributedDataParallel and FSDP2."""

import functools
import warnings

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyro_ext.infer import compile_elbo
from tests.distributed.minibatch_pair import (
    OBJECTIVES,
    Regression,
    assert_all_close,
    module_of,
    share_of,
    train,
)
from tests.distributed.pool import SIZES, objectives

pytestmark = pytest.mark.long
NUM_STEPS = 50


def shard_layers(module):
    for part in module.modules():
        if isinstance(part, nn.Linear):
            fully_shard(part)
    return fully_shard(module)


WRAPPERS = {"ddp": DistributedDataParallel, "whole": fully_shard, "layers": shard_layers}


def compiled(elbo, fallback=False, audit_every=3):
    return compile_elbo(elbo, backend="eager", fallback=fallback, audit_every=audit_every)


def values_of(module):
    params = [x.full_tensor() if isinstance(x, DTensor) else x for x in module.parameters()]
    return torch.cat([x.detach().flatten() for x in params])


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1e-3)  # Adam would hide a wrong scale


def train_wrapped(name, wrapper, audit_every=None):
    compiles = audit_every is not None
    wrap = functools.partial(compiled, audit_every=audit_every)
    module = module_of(name, wrap) if compiles else module_of(name)
    wrapped = WRAPPERS[wrapper](module)
    train(wrapped, sgd(wrapped), range(NUM_STEPS))
    if compiles:
        module.audit()
        assert module.capture_report().num_eager_steps == 1
    return values_of(wrapped)


@functools.cache
def values_of_one_process(name):
    module = module_of(name)
    before = values_of(module)
    train(module, sgd(module), range(NUM_STEPS))
    assert (values_of(module) - before).abs().max() > 0.1
    return values_of(module)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", objectives(OBJECTIVES))
def test_processes_take_the_steps_of_one(pools, size, wrapper, name):
    assert_all_close(pools(size).results(train_wrapped, name, wrapper), values_of_one_process(name))


@pytest.mark.parametrize("audit_every", [3, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapper", ["ddp", "whole"])
@pytest.mark.parametrize("name", objectives(OBJECTIVES))
def test_compiled_processes_take_the_steps_of_one(pools, audit_every, wrapper, name):
    assert_all_close(
        pools(2).results(train_wrapped, name, wrapper, audit_every), values_of_one_process(name)
    )


def train_compiled_layers(name, fallback, num_before):
    """Shard the layers after some steps, which may have a graph."""
    module = module_of(name, functools.partial(compiled, fallback=fallback))
    with torch.no_grad():
        for _ in range(num_before):
            module(share_of(0))
    pyro.clear_param_store()
    shard_layers(module)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(module, sgd(module), range(NUM_STEPS))
    return values_of(module), [str(x.message) for x in found]


@pytest.mark.parametrize("num_before", [0, 3])
def test_sharded_layers_have_eager_steps_and_one_warning(pools, num_before):
    values, texts = zip(
        *pools(2).results(train_compiled_layers, "dreg", True, num_before), strict=True
    )
    assert_all_close(values, values_of_one_process("dreg"))
    for (text,) in texts:
        assert "parameter 'module.model.decoder.0.weight' is sharded" in text
        assert "wrap only the compiled module" in text


def test_sharded_layers_are_refused_without_fallback(pools):
    for text in pools(2).errors(train_compiled_layers, "dreg", False, 0):
        assert "RuntimeError: compile_elbo cannot compile this step: parameter 'module" in text


def train_autoguide(wrap, clears, has_local_params, has_norm, elbo=None):
    """Set up an autoguide, wrap it, and return its parameters and the buffers of the model."""
    with pyro.settings.context(module_local_params=has_local_params):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Regression(has_norm)
        module = (elbo or Trace_ELBO())(model, AutoDiagonalNormal(model))
        with torch.no_grad():
            module(share_of(0))
        if clears:
            pyro.clear_param_store()
        wrapped = wrap(module)
        pyro.set_rng_seed(1)
        train(wrapped, sgd(wrapped), range(NUM_STEPS))
        return values_of(wrapped), list(model.buffers())


@pytest.mark.parametrize("recipe", [(True, False), (False, True)], ids=["clear", "local"])
def test_an_autoguide_is_set_up_before_it_is_sharded(pools, recipe):
    expected, _ = train_autoguide(lambda module: module, *recipe, False)
    found = pools(2).results(train_autoguide, fully_shard, *recipe, False)
    assert_all_close([values for values, _ in found], expected)


def audit_autoguide():
    """Audit the last steps when the parameters are sharded."""
    modules = []

    def wrap(module):
        modules.append(module)
        return fully_shard(module)

    elbo = compiled(Trace_ELBO(), audit_every=5000)
    values, _ = train_autoguide(wrap, False, True, False, elbo)
    (module,) = modules
    with pyro.settings.context(module_local_params=True):
        module.audit()
    (graph,) = module.capture_report().graphs
    assert graph.num_runs >= NUM_STEPS
    assert all(isinstance(x, DTensor) for x in module.parameters())
    return values


def test_an_audit_gathers_parameters(pools):
    expected, _ = train_autoguide(lambda module: module, False, True, False)
    assert_all_close(pools(2).results(audit_autoguide), expected)


@pytest.mark.parametrize("wrapper", [fully_shard, DistributedDataParallel])
def test_statistics_of_minibatches_are_those_of_each_process(pools, wrapper):
    first, second = pools(2).results(train_autoguide, wrapper, True, False, True)
    assert torch.equal(first[0], second[0])
    assert (first[1][0] - second[1][0]).abs().max() > 0.01


def shard_program(role, sharded_module):
    module = module_of("dreg")
    fully_shard(getattr(module, role))
    if sharded_module:
        fully_shard(module)
    module(share_of(0))


@pytest.mark.parametrize("sharded_module", [False, True])
@pytest.mark.parametrize("role", ["model", "guide"])
def test_a_sharded_program_is_refused(pools, role, sharded_module):
    for text in pools(2).errors(shard_program, role, sharded_module):
        assert f"ValueError: ImportanceWeightedELBO: the {role} is wrapped by fully_shard, " in text


def loss_of_unsharded(name, wrap):
    """The loss without the module, after its parameters have been gathered."""
    module = wrap(module_of(name))
    train(module, sgd(module), range(2))
    module.unshard()
    loss = OBJECTIVES[name].loss(module.model, module.guide, share_of(0))
    module.reshard()
    train(module, sgd(module), range(1))
    return loss


def test_gathered_programs_can_be_evaluated(pools):
    whole = pools(2).results(loss_of_unsharded, "dreg", fully_shard)
    layers = pools(2).results(loss_of_unsharded, "dreg", shard_layers)
    assert layers == pytest.approx(whole, abs=1e-4)
