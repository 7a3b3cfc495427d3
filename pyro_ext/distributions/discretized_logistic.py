from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributions.utils import broadcast_all

from pyro_ext.distributions.components import (
    Independent,
    broadcast_components,
    draw_components,
    finite,
    finite_positive,
    log_weights,
    one_of_pair,
)
from pyro_ext.distributions.integer_pixels import ScalarIntegerPixels


class DiscretizedLogistic(ScalarIntegerPixels):
    r"""A logistic distribution that is rounded to the integers ``low..high``.

    .. math::

        P(x) = \sigma\Bigl(\frac{x + 1/2 - \mu}{s}\Bigr) - \sigma\Bigl(\frac{x - 1/2 - \mu}{s}\Bigr)

    The edge bins ``low`` and ``high`` include the tails. Masses and their gradients are exact up to
    rounding for finite locations and for log scales from -80 to 80. There is no floor, no
    threshold, and no clamp of the scale. A log mass below the smallest number of the dtype is
    ``-inf``; its derivative in the log scale is then at most the largest number.

    :param loc: the location, a tensor or number in the units of the pixels.
    :param scale: the scale > 0, in the same units. Give exactly one of ``scale`` and ``log_scale``.
    :param log_scale: the logarithm of the scale.
    :param low: the smallest integer.
    :param high: the largest integer, above ``low``.
    :param validate_args: whether to check parameters and values. By default, Pyro's global setting
        decides.
    :raises TypeError: if ``low`` or ``high`` is not an integer.
    :raises ValueError: if not exactly one of ``scale`` and ``log_scale`` is given, or if not
        low < high. With validation, also if a parameter is not finite, if a scale is not positive,
        or if a value is not an integer in ``low..high``.

    Sources: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improving Variational
    Inference with Inverse Autoregressive Flow; Salimans, Karpathy, Chen and Kingma (2017),
    PixelCNN++.

    >>> import torch
    >>> pixel = DiscretizedLogistic(torch.tensor([3.0, 20.0]), scale=1.5, low=0, high=16)
    >>> pixel.log_prob(torch.tensor([3, 16])).exp()
    tensor([0.1651, 0.9526])
    >>> pixel.enumerate_support().shape
    torch.Size([17, 2])
    """

    arg_constraints: ClassVar = {
        "loc": finite,
        "scale": finite_positive,
        "log_scale": finite,
    }

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float | None = None,
        log_scale: Tensor | float | None = None,
        low: int = 0,
        high: int = 255,
        *,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        given = one_of_pair(owner, scale=scale, log_scale=log_scale)
        if isinstance(loc, Tensor) and not loc.is_floating_point():
            loc = loc.to(torch.get_default_dtype())  # an integer loc would truncate a number scale
        try:
            tensors = broadcast_all(loc, *given.values())
        except RuntimeError as error:
            names = " and ".join(["loc", *given])
            raise ValueError(f"{owner}: the shapes of {names} do not broadcast. {error}") from None
        self._set_up(dict(zip(["loc", *given], tensors, strict=True)), low, high, validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with a larger batch shape. The parameters share memory.

        :param batch_shape: the larger batch shape.
        :returns: the expanded distribution.
        """
        return self._expand_to(batch_shape, DiscretizedLogistic, _instance)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws that follow the masses. Logistic draws are rounded, then clipped.

        :param sample_shape: the shape of the draws, to the left of the batch shape.
        :returns: a tensor of integers, in the dtype of the parameters.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        return self._draw(self.loc.detach().expand(shape), self._wide_scale())

    def _mixture(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_scale = (x[..., None, None] for x in (self.loc, self._wide_log_scale()))
        return self.loc.new_zeros(1), loc, log_scale


class DiscretizedLogisticMixture(ScalarIntegerPixels):
    r"""A mixture of logistic distributions that is rounded to the integers ``low..high``.

    .. math::

        P(x) = \sum_{k=1}^{K} \pi_k \Bigl[ \sigma\Bigl(\frac{x + 1/2 - \mu_k}{s_k}\Bigr)
        - \sigma\Bigl(\frac{x - 1/2 - \mu_k}{s_k}\Bigr) \Bigr]

    The edge bins ``low`` and ``high`` include the tails. Masses and their gradients are exact up to
    rounding for finite locations and for log scales from -80 to 80. There is no floor, no
    threshold, and no clamp of the scale. A log mass below the smallest number of the dtype is
    ``-inf``; its derivative in the log scale is then at most the largest number.

    :param logits: log weights of the components up to a constant, of shape ``(..., K)``; minus
        infinity for a weight of zero. The dims before K are the batch shape.
    :param loc: the locations in the units of the pixels, of shape ``(..., K)``.
    :param scale: the scales > 0 in the same units, of shape ``(..., K)``. Give exactly one of
        ``scale`` and ``log_scale``.
    :param log_scale: the logarithms of the scales, of shape ``(..., K)``.
    :param low: the smallest integer.
    :param high: the largest integer, above ``low``.
    :param validate_args: whether to check parameters and values. By default, Pyro's global setting
        decides.
    :raises TypeError: if a parameter is not a tensor, or if ``low`` or ``high`` is not an integer.
    :raises ValueError: if not exactly one of ``scale`` and ``log_scale`` is given, if the numbers
        of components differ, or if not low < high. With validation, also if a parameter is not
        finite, except for weights of zero, if a scale is not positive, or if a value is not an
        integer in ``low..high``.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++: Improving the PixelCNN with
    Discretized Logistic Mixture Likelihood and Other Modifications.

    A decoder's output for images of 28 x 28 pixels, with 5 components:

    >>> import torch
    >>> logits, loc, log_scale = torch.zeros(3, 10, 1, 28, 28, 5)
    >>> pixels = DiscretizedLogisticMixture(logits, 127.5 + loc, log_scale=3 + log_scale)
    >>> pixels.to_event(3).log_prob(torch.zeros(10, 1, 28, 28, dtype=torch.uint8)).shape
    torch.Size([10])
    """

    arg_constraints: ClassVar = {
        "logits": log_weights,
        "loc": Independent(finite, 1),
        "scale": Independent(finite_positive, 1),
        "log_scale": Independent(finite, 1),
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor | None = None,
        log_scale: Tensor | None = None,
        low: int = 0,
        high: int = 255,
        *,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        given = one_of_pair(owner, scale=scale, log_scale=log_scale)
        parameters = broadcast_components(owner, logits=logits, loc=loc, **given)
        self._set_up(parameters, low, high, validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with a larger batch shape. The parameters share memory.

        :param batch_shape: the larger batch shape.
        :returns: the expanded distribution.
        """
        return self._expand_to(batch_shape, DiscretizedLogisticMixture, _instance)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws that follow the masses. Draws of a component are rounded, then clipped.

        :param sample_shape: the shape of the draws, to the left of the batch shape.
        :returns: a tensor of integers, in the dtype of the parameters.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        component = draw_components(self.logits.detach().to(self._dtype).softmax(-1), shape)
        loc, scale = (
            x.detach().expand(*shape, -1).gather(-1, component).squeeze(-1)
            for x in (self.loc, self._wide_scale())
        )
        return self._draw(loc, scale)

    def _mixture(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.loc.unsqueeze(-2), self._wide_log_scale().unsqueeze(-2)
