import torch


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device: float64, or float32 where there is no float64.

    :param torch.device device: the device on which a sum is accumulated.
    :returns: ``torch.float64``, or ``torch.float32`` on Apple's ``mps``.

    >>> accumulation_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
