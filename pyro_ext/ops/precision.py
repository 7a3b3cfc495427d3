from functools import reduce

import torch
from torch import Tensor


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, or float32 if there is no float64.

    :param device: the device on which a sum is accumulated.
    :returns: ``torch.float64``, or ``torch.float32`` on Apple's ``mps``.

    >>> accumulation_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def promoted_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the common dtype of some tensors, at least float32."""
    return reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
