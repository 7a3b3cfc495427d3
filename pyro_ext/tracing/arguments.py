"""How public functions take programs: an SVI, or model and guide, then the programs' arguments."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
from torch import Tensor

from pyro_ext._arguments import describe
from pyro_ext.tracing.programs import Program, Programs


class _NotGiven:
    def __repr__(self) -> str:
        return "no guide"


#: The default of a guide, which is not None: None stands for the prior.
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
    """The programs that a public function was given, with their arguments.

    :param str owner: the name of the function, for errors.
    :param model: an SVI, or the model.
    :param guide: the guide; after an SVI the first argument of its programs.
    :param args: further arguments of the programs, as are ``kwargs``.
    :param model_args: in place of ``args``.
    :param model_kwargs: further keyword arguments, whose names may clash with those of the
        function.
    :param without_guide: makes a guide from the model where there is none.
    :raises TypeError: if something else stands where a model or guide belongs.
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
    check_program(owner, "model", model)
    if guide is NOT_GIVEN or guide is None:
        if without_guide is None:
            raise TypeError(
                f"{owner}: the guide is missing. Pass it after the model, or pass an SVI."
            )
        guide = without_guide(model)
    check_program(owner, "guide", guide)
    if model_args is not None and args:
        raise TypeError(
            f"{owner}: the programs' arguments were given twice. Pass them after the guide, or as "
            "model_args=, but not both."
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


def check_program(owner: str, role: str, value: Any) -> Program:
    """A model or guide, if it is one.

    :param str role: ``"model"`` or ``"guide"``.
    :raises TypeError: if it is an SVI, a class, or nothing that can be called.
    """
    if callable(value) and not isinstance(value, type) and not is_svi(value):
        return value
    if is_svi(value):
        advice = f"Pass its {role}, svi.{role}"
    elif isinstance(value, type):
        advice = f"Pass an instance of it, such as {value.__name__}(model)"
    elif isinstance(value, Tensor):
        advice = f"Pass the {role} first, then the arguments of model and guide"
    else:
        or_svi = "an SVI, or " if role == "model" else ""
        advice = f"Pass {or_svi}a {role}: a function or module with Pyro primitives"
    raise TypeError(f"{owner}: the {role} is {describe(value)}. {advice}.")


def is_svi(value: Any) -> bool:
    """Whether a value is an SVI, or has what one has."""
    return all(hasattr(value, name) for name in ("model", "guide", "optim"))


def _check_is_stepped(owner: str, svi: Any) -> None:
    is_new = not getattr(svi.optim, "optim_objs", True)
    if is_new and len(pyro.get_param_store()) == 0:
        raise ValueError(
            f"{owner}: the SVI has not been trained. Call svi.step first, or pass its model and "
            "guide."
        )
