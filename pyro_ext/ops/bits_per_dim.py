import math

from torch import Tensor


def bits_per_dim(log_prob: Tensor, num_dims: int) -> Tensor:
    r"""Return a log-probability in nats as bits per dimension.

    .. math:: -\frac{\log p(x)}{D \log 2}

    :param log_prob: log p(x) in nats: a tensor of any shape, or a float.
    :param num_dims: the number of dimensions D >= 1. For an image, it is the number of sub-pixels:
        height x width x channels.
    :returns: a tensor of the same shape as ``log_prob``, in bits. Smaller is better.
    :raises ValueError: if ``num_dims`` is less than one.

    >>> import torch
    >>> bits_per_dim(torch.tensor(-64 * math.log(17)), 64)  # 17 equally likely levels
    tensor(4.0875)
    """
    if num_dims < 1:
        raise ValueError(f"bits_per_dim: num_dims must be at least 1, but it is {num_dims}.")
    return log_prob / (-num_dims * math.log(2))
