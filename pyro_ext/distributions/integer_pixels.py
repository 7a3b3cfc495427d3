"""The base classes of the distributions of integers ``low..high`` that are made of logistics."""

import numbers
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_ext._arguments import describe
from pyro_ext.distributions.components import expand_parameters
from pyro_ext.ops import accumulation_dtype, discretized_logistic_mixture_log_prob
from pyro_ext.ops.precision import promoted_dtype

# The edges of bins are half-integers. Beyond this size, they are not exact in float32.
_LARGEST_INTEGER = 2**22


class IntegerPixels(TorchDistribution):
    """The base class of the discretized logistic family. A subclass defines its mixture."""

    low: int
    high: int

    def _set_up(
        self, parameters: dict[str, Tensor], low: int, high: int, validate_args: bool | None
    ) -> None:
        for name, bound in (("low", low), ("high", high)):
            if isinstance(bound, bool) or not isinstance(bound, numbers.Integral):
                raise TypeError(
                    f"{type(self).__name__}: {name} must be an integer, but it is "
                    f"{describe(bound)}."
                )
            setattr(self, name, int(bound))
        if not -_LARGEST_INTEGER <= self.low < self.high <= _LARGEST_INTEGER:
            raise ValueError(
                f"{type(self).__name__}: low must be less than high, and neither may exceed "
                f"{_LARGEST_INTEGER} in absolute value, but low is {self.low} and high is "
                f"{self.high}."
            )
        for name, x in parameters.items():
            setattr(self, name, x)
        self._given = tuple(parameters)
        shape = parameters["loc"].shape
        batch_shape = parameters["logits"].shape[:-1] if "logits" in parameters else shape
        event_shape = shape[len(batch_shape) : -1]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _expand_to(self, batch_shape: Sequence[int], kind: type, instance: Any) -> Any:
        new = self._get_checked_instance(kind, instance)
        new.low, new.high, new._given = self.low, self.high, self._given
        expand_parameters(self, new, batch_shape, self._given)
        return new

    @abstractmethod
    def _mixture(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``(..., K)``, locations and log scales ``(..., C, K)``, given the channels.

        Locations and log scales may have a wider dtype, so that no digits are lost.
        """
        raise NotImplementedError

    @lazy_property
    def scale(self) -> Tensor:
        """The scales, in the units of the pixels."""
        return self.log_scale.exp()

    @lazy_property
    def log_scale(self) -> Tensor:
        """The logarithms of the scales."""
        return self.scale.log()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass.

        Without validation, an integer outside ``low..high`` gives ``-inf``, NaN gives NaN, and
        fractions are not checked.

        :param value: integers in ``low..high`` of any dtype, including uint8.
        :returns: a tensor of the common shape of value and batch, without the event dims.
        """
        if isinstance(value, Tensor) and not value.is_floating_point():
            value = value.to(self._dtype)  # comparisons of uint8 with negative numbers wrap around
        if self._validate_args:
            self._validate_sample(value)
        return self._log_mass(value)

    def _log_mass(self, value: Tensor) -> Tensor:
        channels = value if self.event_shape else value.unsqueeze(-1)
        return discretized_logistic_mixture_log_prob(
            channels, *self._mixture(channels), self.low, self.high, self._dtype
        )

    def _wide_log_scale(self) -> Tensor:
        if "log_scale" in self._given:
            return self.log_scale.to(self._dtype)
        return self.scale.to(accumulation_dtype(self.scale.device)).log()

    def _wide_scale(self) -> Tensor:
        wide = accumulation_dtype(self.loc.device)
        if "scale" in self._given:
            return self.scale.detach().to(wide)
        return self.log_scale.detach().to(wide).exp()

    def _validate_sample(self, value: Tensor) -> None:
        try:
            super()._validate_sample(value)
        except ValueError:
            interval = constraints.integer_interval(self.low, self.high)
            if not isinstance(value, Tensor) or (valid := interval.check(value)).all():
                raise
            hint, width = "", self.high - self.low
            if value.min() >= 0 and value.max() <= 1:
                to_pixels = f"{self.high} * x" if self.low == 0 else f"{self.low} + {width} * x"
                hint = (
                    f" Values in [0, 1] are not rescaled. Pass x as ({to_pixels}).round(), and "
                    "give loc and scale in the same units."
                )
            raise ValueError(
                f"{type(self).__name__}: pixels must be integers in {self.low}..{self.high}, but "
                f"one is {value[~valid][0].item()}.{hint}"
            ) from None

    @property
    def _dtype(self) -> torch.dtype:
        return promoted_dtype(*(getattr(self, name) for name in self._given))

    def _draw(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return logistic draws, rounded and clipped so that they follow the masses."""
        # A narrow dtype rounds more draws to a tie between integers. A tie favours the even one.
        wide = accumulation_dtype(loc.device)
        uniform = torch.rand(loc.shape, dtype=wide, device=loc.device)
        draw = loc.to(wide) + scale * uniform.logit()
        return draw.round_().clamp_(self.low, self.high).add_(0.0).to(self._dtype)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, low: {self.low}, high: {self.high})"


class ScalarIntegerPixels(IntegerPixels):
    """The base class of distributions of one integer, whose support can be enumerated."""

    has_enumerate_support = True

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """The integers ``low..high``."""
        return constraints.integer_interval(self.low, self.high)

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability that a draw is at most ``value``.

        :param value: real numbers that broadcast with the batch shape.
        :returns: a tensor of the common shape.
        """
        value = value.to(torch.promote_types(value.dtype, self._dtype))
        logits, loc, log_scale = self._mixture(value.unsqueeze(-1))
        # Values outside of the range are replaced below. Infinity would give their gradient NaN.
        edge = value.floor().clamp(self.low, self.high).unsqueeze(-1) + 0.5
        below = torch.sigmoid((edge - loc.squeeze(-2)) * log_scale.squeeze(-2).neg().exp())
        found = (logits.to(self._dtype).softmax(-1) * below).sum(-1).to(self._dtype)
        return found.masked_fill(value >= self.high, 1.0).masked_fill(value < self.low, 0.0)

    @property
    def mean(self) -> Tensor:
        """The mean, computed as a sum over the support."""
        return reduce(torch.add, ((x * mass).sum(0) for x, mass in self._masses()))

    @property
    def variance(self) -> Tensor:
        """The variance, computed as a sum over the support."""
        mean = self.mean
        squares = (((x - mean).square() * mass).sum(0) for x, mass in self._masses())
        return reduce(torch.add, squares)

    @property
    def mode(self) -> Tensor:
        """An integer with the largest mass."""
        found = [(x.expand_as(mass), mass) for x, mass in self._masses()]
        best = [mass.max(0, keepdim=True) for _, mass in found]
        values = torch.cat([x.gather(0, b.indices) for (x, _), b in zip(found, best, strict=True)])
        largest = torch.cat([b.values for b in best])
        return values.gather(0, largest.max(0, keepdim=True).indices).squeeze(0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all integers ``low..high`` along a new first dim.

        :param expand: whether to expand the result over the batch shape.
        :returns: a tensor of shape ``(high - low + 1, *batch_shape)``, or with batch dims of size
            1.
        """
        values = torch.arange(self.low, self.high + 1, dtype=self._dtype, device=self.loc.device)
        values = values.reshape(-1, *(1 for _ in self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def _masses(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of the support with their masses. Each part is small enough for memory."""
        num_terms = max(1, self.loc.numel())
        for values in self.enumerate_support(expand=False).split(max(1, 2**20 // num_terms)):
            yield values, self._log_mass(values).exp()
