"""How public functions accept a model and a guide, or an SVI, with the arguments of both."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from pyro_ext._arguments import describe
from pyro_ext._private.of_torch import is_fully_sharded
from pyro_ext.tracing.programs import Program, Programs


class _NotGiven:
    def __repr__(self) -> str:
        return "no guide"


#: The default of ``guide``. It is not None, because None stands for the prior.
NOT_GIVEN: Any = _NotGiven()


def read_programs(
    owner: str,
    model: Any,
    guide: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    model_args: Sequence[Any] | None,
    model_kwargs: Mapping[str, Any] | None,
    without_guide: Callable[[Program], Program] | None = None,
) -> Programs:
    """Return the model and guide that a public function was given, with their arguments.

    :param owner: the name of the function, for error messages.
    :param model: an SVI, or the model: a callable with Pyro primitives.
    :param guide: the guide. After an SVI it is the first positional argument of model and guide.
    :param args: positional arguments of model and guide.
    :param kwargs: keyword arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        the function.
    :param without_guide: a function that makes a guide from the model if there is none; None if the
        guide is required.
    :raises TypeError: if the model or the guide is missing or has the wrong type, or if an argument
        is given twice.
    :raises ValueError: if the SVI has not been trained.
    """
    args = tuple(args)
    if isinstance(model, tuple) and len(model) == 2:
        warnings.warn(
            f"{owner}: a (model, guide) tuple is deprecated. Pass model and guide one after the "
            "other.",
            DeprecationWarning,
            stacklevel=4,
        )
        args = args if guide is NOT_GIVEN else (guide, *args)
        model, guide = model
    if is_svi(model):
        args = args if guide is NOT_GIVEN else (guide, *args)
        _check_is_stepped(owner, model)
        model, guide = model.model, model.guide
    check_program(owner, "model", model, or_svi="an SVI, or ")
    if guide is NOT_GIVEN or guide is None:
        if without_guide is None:
            raise TypeError(
                f"{owner}: the guide is missing. Pass it after the model, or pass an SVI."
            )
        guide = without_guide(model)
    check_program(owner, "guide", guide)
    if model_args is not None and args:
        raise TypeError(
            f"{owner}: the arguments of model and guide were given twice. Pass them after the "
            "guide, or as model_args=, but not both."
        )
    given_twice = sorted(kwargs.keys() & (model_kwargs or {}).keys())
    if given_twice:
        raise TypeError(
            f"{owner}: {given_twice} were given twice, by name and in model_kwargs=. "
            "Pass them once."
        )
    return Programs(
        model,
        guide,
        args if model_args is None else tuple(model_args),
        {**kwargs, **(model_kwargs or {})},
    )


def check_program(owner: str, role: str, value: Any, or_svi: str = "") -> Program:
    """Return a model or a guide, after a check that it is one.

    :param owner: the name of the function that was given the value, for error messages.
    :param role: ``"model"`` or ``"guide"``.
    :param value: the model or guide.
    :param or_svi: words for the other values that the function accepts.
    :raises TypeError: if it is an SVI, a class, or not callable.
    :raises ValueError: if ``fully_shard`` has wrapped it.
    """
    if is_fully_sharded(poutine.unwrap(value)):
        # The densities are computed after its run, when its parameters may be freed.
        raise ValueError(
            f"{owner}: the {role} is wrapped by fully_shard, which gathers no gradients for a "
            f"module that returns no tensors. Wrap layers in the {role}, and the module "
            "elbo(model, guide)."
        )
    if callable(value) and not isinstance(value, type) and not is_svi(value):
        return value
    if is_svi(value):
        advice = f"Pass its {role}, svi.{role}"
    elif isinstance(value, type):
        advice = f"Pass an instance of it, such as {value.__name__}(model)"
    elif isinstance(value, Tensor):
        advice = "Pass the model, then the guide, then the arguments of both"
    else:
        advice = f"Pass {or_svi}a {role}: a function or module with Pyro primitives"
    raise TypeError(f"{owner}: the {role} is {describe(value)}. {advice}.")


def is_svi(value: Any) -> bool:
    """Return whether a value has the attributes of an SVI."""
    return hasattr(value, "guide") and hasattr(value, "model") and hasattr(value, "optim")


def _check_is_stepped(owner: str, svi: Any) -> None:
    is_new = not getattr(svi.optim, "optim_objs", True)
    if is_new and len(pyro.get_param_store()) == 0:
        raise ValueError(
            f"{owner}: the SVI has not been trained. Call svi.step first. If its guide was trained "
            "elsewhere, pass model and guide."
        )
