"""The private names of torch and Pyro: each fails by name where a new version lacks it."""

import importlib
import warnings

import pyro
import pytest
import torch
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

#: Modules and the private names that ``pyro_ext._private`` takes from them.
IN_MODULES = {
    "torch._C": ["DisableTorchFunction"],
    "torch._C._functorch": ["is_functorch_wrapped_tensor", "is_legacy_batchedtensor"],
    "torch._inductor": ["config", "list_mode_options"],
    "torch._inductor.compile_fx": ["compile_fx"],
    "torch._inductor.decomposition": ["decompositions"],
    "torch._guards": ["TracingContext", "tracing"],
    "torch._subclasses": ["FakeTensorMode"],
    "torch.fx.experimental.symbolic_shapes": ["ShapeEnv"],
    "torch.distributions.transforms": ["_InverseTransform"],
    "torch.utils._pytree": ["tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"],
    "torch.utils._python_dispatch": ["TorchDispatchMode", "_get_current_dispatch_mode_stack"],
    "pyro.infer.discrete": ["_sample_posterior_from_trace"],
    "pyro.optim.optim": ["_load_state_dict"],
    "pyro.poutine.runtime": ["_PYRO_STACK"],
}

#: Objects and their private attributes.
ON_OBJECTS = {
    "module": (lambda: nn.Linear(1, 1), ["_parameters", "_buffers", "_modules"]),
    "tensor": (
        lambda: torch.zeros(1, requires_grad=True),
        ["_backward_hooks", "_post_accumulate_grad_hooks"],
    ),
    "storage": (lambda: torch.zeros(1).untyped_storage(), ["_cdata"]),
    "operator": (lambda: torch.ops.aten.add.Tensor, ["_schema"]),
    "distribution": (lambda: torch.distributions.Normal(0.0, 1.0), ["_validate_sample"]),
    "masked distribution": (
        lambda: pyro.distributions.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])),
        ["_mask"],
    ),
    "Pyro module": (lambda: PyroModule[nn.Linear](1, 1), ["_pyro_name"]),
    "optimiser": (
        lambda: Adam({}),
        ["_get_optim", "_get_grad_clip", "_state_waiting_to_be_consumed"],
    ),
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in IN_MODULES.items() for name in names]
)
def test_a_module_has_the_name(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler about itself
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, names) in ON_OBJECTS.items() for name in names]
)
def test_an_object_has_the_name(kind, name):
    assert hasattr(ON_OBJECTS[kind][0](), name)


def test_schedulers_ask_for_the_mark():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer._opt_called = True
    scheduler.step()
