import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_ext.distributions.components import (
    Independent,
    broadcast_components,
    draw_components,
    expand_parameters,
    finite_positive,
    log_weights,
    one_of_pair,
)
from pyro_ext.ops import (
    accumulation_dtype,
    may_need_gradient,
    normal_scale_mixture_log_densities,
    normal_scale_mixture_log_prob,
)
from pyro_ext.ops.normal_scale_mixture import standardize
from pyro_ext.ops.once_differentiable import zero_with_derivative
from pyro_ext.ops.precision import promoted_dtype


class NormalScaleMixture(TorchDistribution):
    r"""A mixture of normal distributions with mean zero: the scale-mixture prior.

    .. math:: p(x) = \sum_{k=1}^{K} \pi_k \, \mathcal{N}(x \mid 0, \sigma_k^2)

    Draws are reparameterised in the scales and the weights, so the distribution can also be a
    guide. Their derivatives come from implicit differentiation of the distribution function F:
    :math:`dx = -dF / p(x)`. Densities are evaluated in log space and in float64, for every dtype of
    the parameters. They and their gradients are exact up to rounding wherever the ratios of values
    to scales are finite, also if a log density overflows to ``-inf``. Fixed scales may differ by a
    factor of up to 1e150.

    :param scales: the standard deviations > 0, of shape ``(..., K)``. The dims before K are the
        batch shape.
    :param probs: the weights of the components, >= 0, of shape ``(..., K)``. They are normalised to
        sum to one. Give exactly one of ``probs`` and ``logits``.
    :param logits: logarithms of the weights up to a constant, of shape ``(..., K)``; minus infinity
        for a weight of zero.
    :param validate_args: whether to check parameters and values. By default, Pyro's global setting
        decides.
    :raises TypeError: if a parameter is not a tensor.
    :raises ValueError: if not exactly one of ``probs`` and ``logits`` is given, or if the numbers
        of components differ. With validation, also if a parameter is not finite, except for
        ``logits`` of minus infinity, if a scale is not positive, or if a weight is negative.

    Sources: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), Weight Uncertainty in Neural
    Networks, equation 7; Figurnov, Mohamed and Mnih (2018), Implicit Reparameterization Gradients.

    The prior of Blundell et al., a wide and a narrow normal:

    >>> prior = NormalScaleMixture(torch.tensor([1.0, 0.0025]), probs=torch.tensor([0.25, 0.75]))
    >>> prior.log_prob(torch.tensor([0.0, 0.5]))
    tensor([ 4.7857, -2.4302])
    >>> prior.expand([20, 10]).to_event(2).sample().shape
    torch.Size([20, 10])
    """

    arg_constraints: ClassVar = {
        "scales": Independent(finite_positive, 1),
        "probs": constraints.simplex,
        "logits": log_weights,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        scales: Tensor,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        weights = one_of_pair(owner, probs=probs, logits=logits)
        given = broadcast_components(owner, scales=scales, **weights)
        self.scales = given["scales"]
        if "probs" in given:
            # Negative weights stay negative, so that validation rejects them.
            # The division by the largest one prevents an overflow of the sum.
            scaled = given["probs"] / given["probs"].detach().abs().amax(-1, keepdim=True)
            self.probs = scaled / scaled.abs().sum(-1, keepdim=True)
        else:
            self.logits = given["logits"] - given["logits"].logsumexp(-1, keepdim=True)
        # The parameters before expansion: computing with expanded ones would cost as much as with
        # the values.
        self._given: tuple[Any, Any, Any] = scales, probs, logits
        super().__init__(self.scales.shape[:-1], validate_args=validate_args)

    @lazy_property
    def logits(self) -> Tensor:
        """The logarithms of the weights, ``(..., K)``."""
        return self.probs.log()

    @lazy_property
    def probs(self) -> Tensor:
        """The weights, ``(..., K)``, which sum to one."""
        return self.logits.exp()

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with a larger batch shape. The parameters share memory.

        :param batch_shape: the larger batch shape.
        :returns: the expanded distribution.
        """
        new = self._get_checked_instance(NormalScaleMixture, _instance)
        new._given = self._given
        expand_parameters(self, new, batch_shape, {"scales", "probs", "logits"} & vars(self).keys())
        return new

    @property
    def mean(self) -> Tensor:
        """The mean, which is zero."""
        return self.scales.new_zeros(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """The variance: the weighted mean of the squared scales."""
        return (self.probs * self.scales * self.scales).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density.

        :param value: real numbers that broadcast with the batch shape.
        :returns: a tensor of the common shape.
        """
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.promote_types(self._dtype, value.dtype)
        log_prob = normal_scale_mixture_log_prob(value, *self._wide_parameters(), dtype)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return log_prob if log_prob.shape == shape else log_prob.expand(shape)

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability that a draw is at most ``value``.

        :param value: real numbers that broadcast with the batch shape.
        :returns: a tensor of the common shape.
        """
        if self._validate_args:
            self._validate_sample(value)
        scales, log_weights = self._wide_parameters()
        # Small tails keep their digits, which 1 + erf would lose.
        z, _ = standardize(value.to(scales.dtype).unsqueeze(-1), scales)
        below = torch.special.erfc(-z / math.sqrt(2)) / 2
        dtype = torch.promote_types(self._dtype, value.dtype)
        found = (log_weights.exp() * below).sum(-1).to(dtype)
        return found.expand(torch.broadcast_shapes(value.shape, self.batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws with their first derivatives in the scales and the weights.

        :param sample_shape: the shape of the draws, to the left of the batch shape.
        :returns: a tensor that can be differentiated once.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        scales, log_weights = self._wide_parameters()
        with torch.no_grad():
            component = draw_components(log_weights.exp(), shape)
            scale = scales.expand(*shape, -1).gather(-1, component).squeeze(-1)
            draw = scale * torch.randn(shape, dtype=scales.dtype, device=scales.device)
        if may_need_gradient(scales, log_weights):
            draw = draw + self._first_order(draw, scales, log_weights)
        return draw.to(self._dtype)

    def _first_order(self, draw: Tensor, scales: Tensor, log_weights: Tensor) -> Tensor:
        """Return zeros whose gradient is the gradient of the draw at a fixed quantile level."""
        with torch.no_grad():
            log_densities = normal_scale_mixture_log_densities(draw, scales, log_weights)
            log_density = log_densities.logsumexp(-1, keepdim=True)
            z, exponent = standardize(draw.unsqueeze(-1), scales)
            by_scale = (log_densities - log_density).exp() * z
            # The weights' changes sum to zero, so either tail can be used. Use the smaller one.
            log_tail = torch.special.erfcx(z.abs() / math.sqrt(2)).log() + exponent
            log_tail = log_tail + log_weights - math.log(2)
            by_log_weight = draw.sign().unsqueeze(-1) * (log_tail - log_density).exp()
        # Weights of zero have no gradient.
        log_weights = log_weights.masked_fill(log_weights.isinf(), 0.0)
        message = (
            "NormalScaleMixture.rsample can only be differentiated once. Second derivatives are "
            "not available."
        )
        zero = zero_with_derivative(by_scale, scales, message)
        return (zero + zero_with_derivative(by_log_weight, log_weights, message)).sum(-1)

    @property
    def _dtype(self) -> torch.dtype:
        return promoted_dtype(*(x for x in self._given if x is not None))

    def _wide_parameters(self) -> tuple[Tensor, Tensor]:
        """Return scales and normalised log weights before expansion, in the widest dtype."""
        wide = accumulation_dtype(self.scales.device)
        scales, probs, logits = self._given
        if probs is not None:
            probs = probs.to(wide)
            is_zero = probs == 0
            logits = probs.masked_fill(is_zero, 1.0).log().masked_fill(is_zero, -math.inf)
        return scales.to(wide), logits.to(wide).log_softmax(-1)
