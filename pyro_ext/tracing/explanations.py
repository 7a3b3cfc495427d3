"""Explanations of errors that Pyro and torch raise inside of programs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.sites import SiteError

_SIZES = re.compile(
    "shape mismatch|size mismatch|must match|not broadcastable|inconsistent tensor size|"
    "invalid shape|expanded size",
    re.IGNORECASE,
)
_SUBSAMPLES = re.compile(r"subsample_size does not match len\(subsample\), (\d+) vs (\d+)")
_ADVICE = (
    "If sizes do not match: an automatic guide has the plates and parameters of its first run. "
    "Pass the same rows, or fit a new guide. For minibatches, pass it create_plates, a function "
    "that returns the model's plates with their full size and subsample."
)


@contextmanager
def explained(programs: Programs) -> Iterator[None]:
    """Explain errors of model and guide about sizes and NaN.

    :param programs: the model and guide, with their arguments.
    :raises SiteError: if a plate has no elements, or subsamples of different sizes.
    """
    try:
        yield
    except SiteError:
        raise
    except ZeroDivisionError as error:
        if "size cannot be zero" in str(error):
            raise SiteError(
                "A plate has size 0, because the data are empty. Pass at least one data point."
            ) from error
        raise
    except (RuntimeError, ValueError) as error:
        if found := _SUBSAMPLES.search(str(error)):
            raise SiteError(
                f"A plate has {found[1]} rows in the model, but {found[2]} in the guide. An "
                "automatic guide has the plates of its first run, so pass it create_plates, a "
                "function that returns the model's plates with their full size and subsample."
            ) from error
        text, *_ = str(error).split("Trace Shapes")
        is_automatic = isinstance(poutine.unwrap(programs.guide), AutoGuide)
        if is_automatic and _SIZES.search(text):
            _add_note(error, _ADVICE)
        if "invalid values" in text and (names := _arguments_with_nan(programs)):
            _add_note(error, f"The arguments {names} of model and guide hold NaN. Replace it.")
        raise


def _add_note(error: Exception, note: str) -> None:
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _arguments_with_nan(programs: Programs) -> list[object]:
    """Return the positions and names of the tensor arguments that hold NaN."""
    arguments = [*enumerate(programs.args), *programs.kwargs.items()]
    return [name for name, x in arguments if isinstance(x, Tensor) and bool(x.isnan().any())]
