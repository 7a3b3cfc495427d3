"""Private names of Pyro."""

from typing import Any

from pyro.infer.discrete import _sample_posterior_from_trace as sample_posterior
from pyro.infer.traceenum_elbo import _get_common_scale
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.optim.optim import _load_state_dict as load_optimizer_state
from pyro.poutine.runtime import _PYRO_STACK as HANDLER_STACK
from torch import Tensor

__all__ = [
    "COMMON_SCALE",
    "HANDLER_STACK",
    "load_optimizer_state",
    "make_grad_clip",
    "make_optimizer",
    "mask_of",
    "name_of",
    "packed_dims",
    "sample_posterior",
    "samples_of",
    "set_waiting_states",
    "waiting_states",
    "with_packed_dims",
]

#: The function of Pyro that returns the scale of all enumerated sites, and checks it.
COMMON_SCALE = _get_common_scale.__name__


def mask_of(fn: Any) -> Any:
    """Return the mask of a masked distribution, or None if it is not masked."""
    return getattr(fn, "_mask", None)


def name_of(module: PyroModule) -> str:
    """Return the name of a module inside of the module that holds it; empty if none does."""
    return module._pyro_name


def packed_dims(x: Tensor) -> str:
    """Return the names of the dims of a packed tensor."""
    return x._pyro_dims  # type: ignore[attr-defined]


def with_packed_dims(x: Tensor, dims: str) -> Tensor:
    """Return a tensor with names for its dims, as a packed tensor."""
    x._pyro_dims = dims  # type: ignore[attr-defined]
    return x


def samples_of(module: PyroModule) -> dict[str, Any]:
    """Return the priors of the latent attributes of a module, by name."""
    return dict(module._pyro_samples)


def make_optimizer(optim: PyroOptim, param: Tensor) -> Any:
    """Return the torch optimiser that Pyro creates for a parameter."""
    return optim._get_optim(param)


def make_grad_clip(optim: PyroOptim, param: Any) -> Any:
    """Return the function with which Pyro clips the gradient of a parameter, or None."""
    return optim._get_grad_clip(param)


def waiting_states(optim: PyroOptim) -> dict[Any, Any]:
    """Return the loaded optimiser states that wait for their parameters, by parameter name."""
    return optim._state_waiting_to_be_consumed


def set_waiting_states(optim: PyroOptim, states: dict[str, Any]) -> None:
    """Set the loaded optimiser states that wait for their parameters."""
    optim._state_waiting_to_be_consumed = states
