from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.distributions.components import (
    Independent,
    broadcast_components,
    draw_components,
    finite,
    finite_positive,
    log_weights,
    one_of_pair,
)
from pyro_ext.distributions.integer_pixels import IntegerPixels
from pyro_ext.ops import accumulation_dtype


class RGBDiscretizedLogisticMixture(IntegerPixels):
    r"""A mixture of discretized logistics for pixels of three channels that depend on each other.

    .. math::

        P(r, g, b) = \sum_k \pi_k P_k(r) P_k(g \mid r) P_k(b \mid r, g)

    Each factor is a logistic rounded to ``low..high``. The edge bins include the tails. With m =
    (low + high) / 2, the location of green is shifted by c_0 (r - m), and the location of blue by
    c_1 (r - m) + c_2 (g - m). All channels of a pixel share the component. This is the likelihood
    of PixelCNN++. There, the pixels are rescaled to [-1, 1], and the network passes the
    coefficients through tanh. Masses and their gradients are exact up to rounding as those of
    :class:`DiscretizedLogisticMixture`, if the shifted locations are numbers of the dtype as well.

    :param logits: log weights of the components up to a constant, of shape ``(..., K)``; minus
        infinity for a weight of zero. The dims before K are the batch shape, and the event shape is
        (3,).
    :param loc: the locations in the units of the pixels, of shape ``(..., 3, K)``.
    :param scale: the scales > 0 in the same units, of shape ``(..., 3, K)``. Give exactly one of
        ``scale`` and ``log_scale``.
    :param log_scale: the logarithms of the scales, of shape ``(..., 3, K)``.
    :param coeffs: the coefficients c_0, c_1, c_2, without a unit, of shape ``(..., 3, K)``; zeros
        by default.
    :param low: the smallest integer.
    :param high: the largest integer, above ``low``.
    :param validate_args: whether to check parameters and values. By default, Pyro's global setting
        decides.
    :raises TypeError: if a parameter is not a tensor, or if ``low`` or ``high`` is not an integer.
    :raises ValueError: if not exactly one of ``scale`` and ``log_scale`` is given, if shapes do not
        match, or if not low < high. With validation, also if a parameter is not finite, except for
        weights of zero, if a scale is not positive, or if a value is not an integer in
        ``low..high``.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++: Improving the PixelCNN with
    Discretized Logistic Mixture Likelihood and Other Modifications.

    >>> logits, parameters = torch.zeros(4, 8, 8, 10), torch.zeros(3, 4, 8, 8, 3, 10)
    >>> loc, log_scale, coeffs = parameters
    >>> pixels = RGBDiscretizedLogisticMixture(
    ...     logits, 127.5 + loc, log_scale=3 + log_scale, coeffs=coeffs
    ... )
    >>> pixels.sample().shape
    torch.Size([4, 8, 8, 3])
    >>> pixels.to_event(2).log_prob(pixels.sample()).shape
    torch.Size([4])
    """

    _matrix: ClassVar = Independent(finite, 2)
    arg_constraints: ClassVar = {
        "logits": log_weights,
        "loc": _matrix,
        "scale": Independent(finite_positive, 2),
        "log_scale": _matrix,
        "coeffs": _matrix,
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor | None = None,
        log_scale: Tensor | None = None,
        coeffs: Tensor | None = None,
        low: int = 0,
        high: int = 255,
        *,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        given = one_of_pair(owner, scale=scale, log_scale=log_scale)
        if coeffs is None:
            broadcast_components(owner, num_dims=2, loc=loc)
            coeffs = torch.zeros_like(loc)
        by_channel = {"loc": loc, "coeffs": coeffs, **given}
        broadcast_components(owner, num_dims=2, **by_channel)
        for name, x in by_channel.items():
            if x.shape[-2] != 3:
                raise ValueError(
                    f"{owner}: {name} must be a tensor of shape (..., 3, K), but its shape is "
                    f"{tuple(x.shape)}."
                )
        broadcast_components(owner, logits=logits)
        parameters = broadcast_components(
            owner, num_dims=2, logits=logits.unsqueeze(-2), **by_channel
        )
        parameters["logits"] = parameters["logits"][..., 0, :]
        self._set_up(parameters, low, high, validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Sequence[int]) -> tuple[torch.Size, torch.Size]:
        """Return the batch shape and the event shape, given the shapes of the arguments.

        :param arg_shapes: the shapes, by the names of the arguments; ``()`` for numbers and None.
        """
        batch_shapes = (
            shape[: -cls.arg_constraints[name].event_dim]
            for name, shape in arg_shapes.items()
            if name in cls.arg_constraints
        )
        return torch.broadcast_shapes(*batch_shapes), torch.Size([3])

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """The triples of integers ``low..high``."""
        return Independent(constraints.integer_interval(self.low, self.high), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with a larger batch shape. The parameters share memory.

        :param batch_shape: the larger batch shape.
        :returns: the expanded distribution.
        """
        return self._expand_to(batch_shape, RGBDiscretizedLogisticMixture, _instance)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws that follow the masses: channel by channel, each rounded and clipped.

        :param sample_shape: the shape of the draws, to the left of the batch shape.
        :returns: a tensor of integers, in the dtype of the parameters.
        """
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        weights = self.logits.detach().to(self._dtype).softmax(-1)
        component = draw_components(weights, shape).unsqueeze(-1).expand(*shape, 3, 1)
        wide = accumulation_dtype(self.loc.device)
        loc, scale, coeffs = (
            x.detach().to(wide).expand(*shape, -1, -1).gather(-1, component).squeeze(-1)
            for x in (self.loc, self._wide_scale(), self.coeffs)
        )
        middle = (self.low + self.high) / 2
        red = self._draw(loc[..., 0], scale[..., 0])
        green = self._draw(loc[..., 1] + coeffs[..., 0] * (red - middle), scale[..., 1])
        shift = coeffs[..., 1] * (red - middle) + coeffs[..., 2] * (green - middle)
        blue = self._draw(loc[..., 2] + shift, scale[..., 2])
        return torch.stack([red, green, blue], -1)

    def _mixture(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A wide dtype, because the shifts are large and the distances to a pixel small.
        wide = accumulation_dtype(value.device)
        centered = value.to(wide) - (self.low + self.high) / 2
        red, green = centered[..., 0, None], centered[..., 1, None]
        c0, c1, c2 = self.coeffs.to(wide).unbind(-2)
        of_red, of_green, of_blue = self.loc.to(wide).unbind(-2)
        locs = torch.broadcast_tensors(of_red, of_green + c0 * red, of_blue + c1 * red + c2 * green)
        return self.logits, torch.stack(locs, -2), self._wide_log_scale()

    @property
    def mean(self) -> NoReturn:
        """Not available: there is no closed form."""
        self._raise_for_moments("mean")

    @property
    def variance(self) -> NoReturn:
        """Not available: there is no closed form."""
        self._raise_for_moments("variance")

    @property
    def mode(self) -> NoReturn:
        """Not available: there is no closed form."""
        self._raise_for_moments("mode")

    def cdf(self, value: Tensor) -> NoReturn:
        """Raise a NotImplementedError: there is no closed form."""
        self._raise_for_moments("cdf")

    def enumerate_support(self, expand: bool = True) -> NoReturn:
        """Raise a NotImplementedError: the support is too large."""
        self._raise_for_moments("enumerate_support")

    def _raise_for_moments(self, name: str) -> NoReturn:
        raise NotImplementedError(
            f"RGBDiscretizedLogisticMixture.{name} is not available. Green and blue depend on a "
            "red that is rounded and clipped, so there is no closed form, and the support has "
            f"{self.high - self.low + 1}^3 values. Average draws of sample() instead."
        )
