"""The arithmetic of mixtures of discretized logistics for a compiler, which fuses operations.

The gradients are derived by hand.

For a bin [x - 1/2, x + 1/2], let t = exp(-log_scale) and c = (x - loc) t. In units of the scale,
the signed distance from loc to the nearer edge of the bin is n = |c| - t / 2. The distance to the
farther edge is n + t. With the masses p = sigmoid(n) and q = sigmoid(-n - t) beyond these edges,

    mass                 = 1 - p - q = (1 - p) (1 - q) (1 - exp(-t))
    d log mass / d loc   = sign(c) (p - q) t
    d log mass / d log s = n p - (n + t) q - t exp(-t) / (1 - exp(-t)).

Let a = exp(-|n|), b = exp(-n - t), D = 1 / ((1 + a) (1 + b)), A = exp(min(n, 0)) and
Z = exp(-max(n, 0)). One of A and Z is a, and the other is one. Two exponentials are enough:

    exp(-t) = A exp(-t - min(n, 0)),  b = Z exp(-t - min(n, 0)),
    p = A (1 + b) D,  q = b (1 + a) D,  p - q = (A - Z b) D = A (1 - exp(-2 |c|)) D.

A mass is the product of three factors: exp(-max(n, 0)) and min(t, 1), whose logarithms are known,
and D (1 - exp(-t)) / min(t, 1), which is not small. The complement of a mass near one has only
positive terms: exp(-t) + (1 - exp(-t)) (a + b + a b) D.

A bin at an end of the range includes the tail, and has no farther edge. For this bin, b and exp(-t)
are zero, c is infinite, and min(t, 1) is one.

A distance n can exceed the largest number of the dtype. The log mass is then minus infinity, and
the derivative in the log scale is the largest number, so that its product with zero is zero. If all
components of a point are that far away, the nearest one is found by distances in a larger unit.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

# exp(-LARGE) is zero in every dtype. LARGE x 0 is zero as well, but inf x 0 is NaN.
LARGE = 1e4

# A unit of distances. For log scales down to -80, no distance overflows in this unit, and one that
# overflows without it does not underflow.
UNIT = 2.0**118

# A product of this many factors does not underflow.
_MAX_FACTORS = 16


def evaluate_mixture(
    value: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, ...]:
    """Return the log mass of a mixture and, if needed, its gradients in the three parameters.

    :param value: integers of shape ``(C, 1, N)``, in the dtype of ``loc``.
    :param logits: log weights of shape ``(K, N)``, in the dtype of the results.
    :param loc: locations of shape ``(C, K, N)``.
    :param log_scale: log scales of shape ``(C, K, N)``.
    :param low: the smallest integer.
    :param high: the largest integer.
    """
    dtype = logits.dtype
    smallest = torch.finfo(dtype).min
    terms = _evaluate_bins(value, loc, log_scale, low, high, dtype, needs_gradient)
    joint, factor, complement = _over_channels(terms)
    logits = logits - logits.amax(0)
    weights = logits.exp()
    total = weights.sum(0)
    weights.div_(total)
    # Near mass one, only the complement is accurate to all digits.
    complement = complement.mul_(weights).sum(0)
    joint = joint.add_(logits).clamp_(min=smallest)
    largest = joint.amax(0)
    is_beyond = largest == smallest
    joint.sub_(largest)
    if needs_gradient:
        from_nearest = terms.excess.sum(0).add_(logits, alpha=1 / UNIT).clamp_(min=smallest)
        from_nearest.sub_(from_nearest.amax(0))
        joint.addcmul_(from_nearest, is_beyond.to(dtype).mul_(UNIT))
    shares = joint.exp_().mul_(factor)
    sums = shares.sum(0)
    by_sums = largest.sub_(total.log()).add_(sums.log()).masked_fill_(is_beyond, -math.inf)
    log_prob = torch.where(complement < 0.5, complement.neg().log1p_(), by_sums)
    if not needs_gradient:
        return (log_prob,)
    shares.div_(sums)
    return (
        log_prob,
        shares - weights,
        terms.by_loc.mul_(shares),
        terms.by_log_scale.mul_(shares),
    )


class _Terms(NamedTuple):
    """Terms of each channel and component, of shape ``(C, K, N)``.

    :ivar exponent: the logarithm of the factors of the mass whose logarithms are known.
    :ivar factor: the other factor.
    :ivar complement: one minus the mass.
    :ivar excess: minus the distance to a bin that does not contain the location, in a larger unit.
    :ivar by_loc: the derivative of the log mass in the location.
    :ivar by_log_scale: the derivative of the log mass in the log scale.
    """

    exponent: Tensor
    factor: Tensor
    complement: Tensor
    excess: Tensor
    by_loc: Tensor
    by_log_scale: Tensor


def _over_channels(terms: _Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exponent, the factor and the complement of all channels, ``(K, N)``."""
    exponent, factor, complement, *_ = terms
    C = len(exponent)
    if C == 1:
        return exponent.squeeze(0), factor.squeeze(0), complement.squeeze(0)
    if C > _MAX_FACTORS:
        log_mass = exponent.add_(factor.log()).sum(0)
        return log_mass, torch.ones_like(log_mass), log_mass.expm1().neg_()
    return (
        exponent.sum(0),
        reduce(torch.mul, factor.unbind()),
        reduce(lambda x, y: (x + y).addcmul_(x, y, value=-1), complement.unbind()),
    )


def _evaluate_bins(
    value: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype,
    needs_gradient: bool,
) -> _Terms:
    """Return the terms of each bin. Each operation is a pass over memory, so most work in place."""
    is_low, is_high = value == low, value == high
    is_end = is_low | is_high
    largest = torch.finfo(dtype).max
    t = log_scale.neg().exp_().to(dtype)
    # Subtract each edge separately: digits would cancel in |c| - t / 2.
    n = (value - 0.5).masked_fill_(is_low, -math.inf) - loc
    n = n.clamp_(min=loc - (value + 0.5).masked_fill_(is_high, math.inf)).to(dtype)
    excess = n.clamp(min=0, max=largest).mul_(-1 / UNIT).mul_(t) if needs_gradient else n
    n = (n * t).clamp_(min=-LARGE, max=largest)
    # With this shift, the distance to the farther edge is at least LARGE.
    width = t + is_end.to(dtype).mul_(2 * LARGE)

    is_outside = n > 0
    a = n.abs().neg_().exp_()
    upper, lower = torch.where(is_outside, 1.0, a), torch.where(is_outside, a, 1.0)
    exp_minus_t = n.clamp(max=0).add_(width).neg_().exp_()
    b = lower * exp_minus_t
    exp_minus_t.mul_(upper)
    one_minus_exp = _difference(width, torch.ones_like(upper), exp_minus_t)
    D = ((1 + a) * (1 + b)).reciprocal_()
    r = one_minus_exp * D
    near_one = torch.addcmul(a + b, a, b).mul_(r).add_(exp_minus_t)
    complement = torch.where(is_outside, 1 - a * r, near_one)
    exponent = log_scale.to(dtype).clamp(min=0).masked_fill_(is_end, 0.0)
    exponent = exponent.add_(n.clamp(min=0)).neg_()
    factor = r.div_(width.clamp(max=1))
    if not needs_gradient:
        return _Terms(exponent, factor, complement, n, n, n)

    c = value.masked_fill(is_low, -math.inf).masked_fill_(is_high, math.inf) - loc
    c = c.to(dtype)
    by_loc = _difference((c.abs() * t).mul_(2), upper, lower.mul_(b)).mul_(D).mul_(t).copysign_(c)
    minus_farther = (n + width).neg_().clamp_(min=-LARGE)
    p, q = (1 + b).mul_(upper).mul_(D), (1 + a).mul_(b).mul_(D)
    by_log_scale = exp_minus_t.mul_(t).div_(one_minus_exp).neg_()
    by_log_scale.addcmul_(n, p).addcmul_(minus_farther, q)
    return _Terms(exponent, factor, complement, excess, by_loc, by_log_scale)


def _difference(x: Tensor, larger: Tensor, smaller: Tensor) -> Tensor:
    """Return ``larger - smaller``, where ``smaller = larger * exp(-x)``, to all digits."""
    small = x.clamp(max=1)
    last = 11 if x.dtype == torch.float32 else 19
    series = torch.full_like(x, 1 / math.factorial(last))
    for n in reversed(range(1, last)):
        series = 1 / math.factorial(n) - small * series
    return torch.where(x < 1, larger * small * series, larger - smaller)
