"""The user's scale of a program, where it is the same at every site.

SVI maximises a multiple of the bound if every site has the same scale. The guide then still fits
the posterior without the scale, so such a scale is no part of the weights.
"""

import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_ext.tracing.matching import SiteRecord


def uniform_scale(records: Sequence[SiteRecord], dims: Sequence[int]) -> Any:
    """Return the product of the user's scales if it is the same at every site, else 1.

    Two scale tensors count as the same only if they are the same object. Such a tensor must have
    size 1 along every dim that is not a common plate.

    :param records: the records of the sites.
    :param dims: the dims of the common plates.
    :returns: a number, or a tensor that broadcasts against the log-probabilities of the sites.
    """
    keys = {
        tuple(s if isinstance(s, numbers.Number) else id(s) for s in record.user_scales)
        for record in records
    }
    if len(keys) != 1:
        return 1.0
    product: Any = 1.0
    for scale in records[0].user_scales:
        if isinstance(scale, Tensor) and any(
            scale.shape[d] != 1 for d in range(-scale.dim(), 0) if d not in dims
        ):
            return 1.0
        product = product * scale
    return product


def along(scale: Any, dims: Sequence[int]) -> Any:
    """Return a scale that broadcasts against the sizes of the common plates.

    :param scale: the result of :func:`uniform_scale`.
    :param dims: the dims of the common plates, from left to right.
    """
    if not isinstance(scale, Tensor):
        return scale
    return scale.reshape([scale.shape[d] if -d <= scale.dim() else 1 for d in dims])


def divided(log_prob: Tensor, scale: Any) -> Tensor:
    """Return a log-probability without a scale that multiplies it."""
    if isinstance(scale, Tensor):
        # Where the scale is zero, the scaled log-probabilities are zero already.
        return log_prob / scale.masked_fill(scale == 0, 1)
    return log_prob if scale == 1 else log_prob / scale
