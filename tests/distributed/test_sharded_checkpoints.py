"""Checkpoints that another number of processes can resume."""

import functools

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from pyro_ext.infer import LinearKL
from tests.distributed.minibatch_pair import OBJECTIVES, assert_all_close, module_of, train
from tests.distributed.test_module_form import WRAPPERS, compiled, shard_layers, values_of

pytestmark = [pytest.mark.long, pytest.mark.slow]
NUM_SAVED, NUM_STEPS = 20, 40


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-3)


def state_of(module, optimizer):
    of_module, of_optimizer = get_state_dict(module, optimizer)
    return {"module": of_module, "optimizer": of_optimizer}


def train_and_save(name, wrap, folder):
    module = wrap(module_of(name))
    optimizer = adam(module)
    train(module, optimizer, range(NUM_SAVED))
    checkpoint.save(state_of(module, optimizer), checkpoint_id=folder)
    return values_of(module)


def resume(name, wrap, folder, make=module_of):
    """Load into other parameters, and take the remaining steps."""
    module = make(name)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_()
    module = wrap(module)
    optimizer = adam(module)
    state = state_of(module, optimizer)
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["module"],
        optim_state_dict=state["optimizer"],
    )
    train(module, optimizer, range(NUM_SAVED, NUM_STEPS))
    return values_of(module)


@functools.cache
def values_of_one_process(name):
    module = module_of(name)
    train(module, adam(module), range(NUM_STEPS))
    return values_of(module)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_resume_the_run_of_four(pools, tmp_path, wrapper, name):
    wrap, folder = WRAPPERS[wrapper], str(tmp_path)
    pools(4).results(train_and_save, name, wrap, folder)
    assert_all_close(pools(2).results(resume, name, wrap, folder), values_of_one_process(name))


def test_compiled_steps_or_one_process_resume_the_run_of_four(pools, tmp_path):
    folder = str(tmp_path)
    pools(4).results(train_and_save, "dreg", shard_layers, folder)
    make = functools.partial(module_of, wrap=compiled)
    assert_all_close(
        pools(2).results(resume, "dreg", fully_shard, folder, make), values_of_one_process("dreg")
    )
    with pytest.warns(UserWarning, match="the intent is to load in a single process"):
        alone = resume("dreg", lambda module: module, folder)
    assert_all_close([alone], values_of_one_process("dreg"))


def save_schedule(folder):
    schedule = LinearKL(10)
    for _ in range(4):
        schedule.step()
    checkpoint.save({"schedule": schedule}, checkpoint_id=folder)


def load_schedule(folder):
    schedule = LinearKL(10)
    checkpoint.load({"schedule": schedule}, checkpoint_id=folder)
    return schedule.num_steps_taken


def test_a_checkpoint_holds_a_schedule(pools, tmp_path):
    pools(4).results(save_schedule, str(tmp_path))
    assert pools(2).results(load_schedule, str(tmp_path)) == [4, 4]
