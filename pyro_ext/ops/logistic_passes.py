"""The arithmetic of mixtures of discretized logistics, operation by operation.

It is that of ``logistic_bins`` in other terms, because torch has fast operations for them. They are
not for a compiler, whose kernels would lose the digits of a mass near one. With
m = min(p, 1 - p) and Q = m + q - m q,

    log mass             = min(-n, 0) + log r,    r = (1 - exp(-t)) (1 - Q)
    d log mass / d loc   = sign(c) (1 - exp(-2 |c|)) p (1 - q) t.

The sum 1 - r = exp(-t) + (1 - exp(-t)) Q has only positive terms. Where r is near one, the log of
the rounded r is corrected by the difference between 1 - r and this sum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ext.ops.logistic_bins import LARGE, UNIT


def evaluate_by_passes(
    value: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    needs_gradient: bool,
    out: Sequence[Tensor | None] = (None,) * 4,
) -> tuple[Tensor, ...]:
    """Return the results of ``evaluate_mixture``. It overwrites the parameters.

    :param out: tensors for the results.

    Each operation is a pass over memory, so most of them work in place.
    """
    log_mass, excess, by_loc, by_log_scale = _evaluate_bins(
        value, loc, log_scale, low, high, logits.dtype, needs_gradient
    )
    joint = _sum_of_channels(log_mass)
    smallest = torch.finfo(joint.dtype).min
    if len(logits) == 1:
        no_weight = logits.sub_(logits)  # zero, but NaN if there is no weight to normalise
        is_beyond = joint == smallest
        log_prob = joint.add_(no_weight).masked_fill_(is_beyond, -math.inf).squeeze(0)
        found = (log_prob, no_weight, by_loc, by_log_scale) if needs_gradient else (log_prob,)
        return tuple(x if to is None else to.copy_(x) for x, to in zip(found, out, strict=False))
    if needs_gradient:
        from_nearest = _sum_of_channels(excess).add_(logits, alpha=1 / UNIT).clamp_(min=smallest)
        from_nearest.sub_(from_nearest.amax(0))
    logits.sub_(logits.amax(0))
    weights = logits.exp()
    total = weights.sum(0)
    weights.mul_(total.reciprocal())
    # Near mass one, only the complement is accurate to all digits.
    complement = joint.expm1().mul_(weights).sum(0)
    joint.add_(logits).clamp_(min=smallest)
    largest = joint.amax(0)
    is_beyond = largest == smallest
    joint.sub_(largest)
    if needs_gradient:
        joint.addcmul_(from_nearest, is_beyond.to(joint.dtype).mul_(UNIT))
    sums = joint.exp_().sum(0)
    by_sums = largest.sub_(total.log_()).add_(sums.log()).masked_fill_(is_beyond, -math.inf)
    log_prob = torch.where(complement > -0.5, complement.log1p(), by_sums, out=out[0])
    if not needs_gradient:
        return (log_prob,)
    shares = joint.mul_(sums.reciprocal_())
    return (
        log_prob,
        torch.sub(shares, weights, out=out[1]),
        torch.mul(by_loc, shares, out=out[2]),
        torch.mul(by_log_scale, shares, out=out[3]),
    )


def _sum_of_channels(x: Tensor) -> Tensor:
    return x.sum(0) if len(x) > 1 else x.squeeze(0)


def _evaluate_bins(
    value: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log mass of each bin, ``(C, K, N)``, and its derivatives.

    The second result is the distance to a bin that does not contain the location, in a larger unit.
    """
    is_low, is_high = value == low, value == high
    lower = (value - 0.5).masked_fill_(is_low, -math.inf)
    upper = (value + 0.5).masked_fill_(is_high, math.inf)
    # The distance to the nearer edge is at least -LARGE. With this shift, the distance to the
    # farther edge is at least LARGE.
    edge = (is_low | is_high).to(dtype).mul_(-2 * LARGE)
    excess = by_loc = by_log_scale = loc.new_empty(0)
    largest = torch.finfo(dtype).max
    t = log_scale.neg_().exp_().to(dtype)
    if needs_gradient:
        center = value.masked_fill(is_low, -math.inf).masked_fill_(is_high, math.inf)
        offset = (center - loc).to(dtype)
        slope = offset.abs().mul_(t).mul_(-2).expm1_().copysign_(offset).mul_(t)
        del offset
    # Subtract each edge separately: digits would cancel in |c| - t / 2.
    nearer = (lower - loc).clamp_(min=loc.sub_(upper)).to(dtype)
    del loc
    if needs_gradient:
        excess = nearer.clamp(min=0, max=largest).mul_(-1 / UNIT).mul_(t)
    nearer.mul_(t).clamp_(min=-LARGE, max=largest)
    exponent = edge - t
    minus_farther = (exponent - nearer).clamp_(min=-LARGE)
    p, q = nearer.sigmoid(), minus_farther.sigmoid()
    minus_inside = exponent.expm1()
    exp_minus_t = exponent.exp_()
    if needs_gradient:
        by_log_scale = t.mul_(exp_minus_t).div_(minus_inside)
        by_log_scale.addcmul_(nearer, p).addcmul_(minus_farther, q)
        by_loc = torch.addcmul(p, p, q, value=-1).mul_(slope)
        del slope

    p.clamp_(max=1 - p)
    q.addcmul_(p, q, value=-1).add_(p).mul_(minus_inside)
    one_minus_r = exp_minus_t.sub_(q)
    r = q.sub_(minus_inside)
    del p, minus_inside
    log_mass = r.log().addcmul_((1 - r).sub_(one_minus_r), r)
    log_mass.sub_(nearer.clamp_(min=0))
    return log_mass, excess, by_loc, by_log_scale
