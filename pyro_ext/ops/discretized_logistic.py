"""The log mass of mixtures of discretized logistics, with gradients derived by hand.

For a bin [x - 1/2, x + 1/2], let t = exp(-log_scale) and c = (x - loc) t. In units of the scale,
the signed distance from loc to the nearer edge of the bin is n = |c| - t / 2. The distance to the
farther edge is n + t. With the masses p = sigmoid(n) and q = sigmoid(-n - t) beyond these edges,

    mass                 = 1 - p - q = (1 - p) (1 - q) (1 - exp(-t))
    d log mass / d loc   = sign(c) (1 - exp(-2 |c|)) p (1 - q) t
    d log mass / d log s = n p - (n + t) q - t / (exp(t) - 1).

A bin at an end of the range includes the tail, and has no farther edge. For this bin, q and exp(-t)
are zero, and c is infinite.

With m = min(p, 1 - p) and Q = m + q - m q,

    log mass = min(-n, 0) + log r,    r = (1 - exp(-t)) (1 - Q).

The sum 1 - r = exp(-t) + (1 - exp(-t)) Q has only positive terms. Where r is near one, the log of
the rounded r is corrected by the difference between 1 - r and this sum.

A distance n can exceed the largest number of the dtype. The log mass is then minus infinity, and
the derivative in the log scale is the largest number, so that its product with zero is zero. If all
components of a point are that far away, the nearest one is found by distances in a larger unit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyro_ext.ops.once_differentiable import is_traced, is_transformed, may_need_gradient
from pyro_ext.ops.precision import promoted_dtype

#: The number of terms (points x channels x components) that are computed at once on a CPU.
BLOCK_SIZE = 2**18

# exp(-LARGE) is zero in every dtype. LARGE x 0 is zero as well, but inf x 0 is NaN.
_LARGE = 1e4

# A unit of distances. For log scales down to -80, no distance overflows in this unit, and one that
# overflows without it does not underflow.
_UNIT = 2.0**118


def discretized_logistic_mixture_log_prob(
    value: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    low: int,
    high: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return the log mass of integers under a mixture of discretized logistics.

    .. math::

        \log \sum_k \pi_k \prod_c \Bigl[ \sigma\Bigl(\frac{x_c + 1/2 - \mu_{ck}}{s_{ck}}\Bigr)
        - \sigma\Bigl(\frac{x_c - 1/2 - \mu_{ck}}{s_{ck}}\Bigr) \Bigr]

    The bins of ``low`` and ``high`` include the tails. All C channels of a point share the
    component.

    :param value: integers of shape ``(..., C)`` and any dtype. Values outside ``low..high`` give
        ``-inf``, and NaN gives NaN. Fractions are not checked.
    :param logits: unnormalised log weights of the components, of shape ``(..., K)``.
    :param loc: finite locations of shape ``(..., C, K)``, in the units of ``value``.
    :param log_scale: logarithms of the scales, from -80 to 80, of shape ``(..., C, K)``.
    :param low: the smallest integer.
    :param high: the largest integer, at least ``low``.
    :param dtype: the dtype of the result and of most of the arithmetic. By default, it is the
        common dtype of the parameters, at least float32. A wider ``loc`` or ``log_scale`` keeps its
        dtype in two places where digits cancel: the distances to the edges, and the scale.
    :returns: a tensor of the common batch shape. It can be differentiated once in ``logits``,
        ``loc`` and ``log_scale``.
    :raises ValueError: if the shapes do not match, or if ``low > high``.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++.

    >>> value = torch.arange(4.0).unsqueeze(-1)
    >>> parameters = torch.zeros(2), torch.tensor([[0.3, 2.0]]), torch.zeros(1, 2)
    >>> log_prob = discretized_logistic_mixture_log_prob(value, *parameters, low=0, high=3)
    >>> log_prob.exp().sum()
    tensor(1.)
    """
    if low > high:
        raise ValueError(
            f"discretized_logistic_mixture_log_prob: low={low} is above high={high}. Pass low <= "
            "high."
        )
    if dtype is None:
        dtype = promoted_dtype(logits, loc, log_scale)
    logits = logits.to(dtype)
    loc, log_scale = (x.to(torch.promote_types(x.dtype, dtype)) for x in (loc, log_scale))
    value = value.to(loc.dtype)
    shape = _common_shape(value, logits, loc, log_scale)
    *batch_shape, C, K = shape
    value = value.expand(*batch_shape, C)
    parameters = (
        _expand(logits, (*batch_shape, K)),
        _expand(loc, shape),
        _expand(log_scale, shape),
    )
    needs_gradient = may_need_gradient(*parameters)
    log_prob, *_ = _LogProb.apply(value, *parameters, low, high, needs_gradient)
    return log_prob.masked_fill(((value < low) | (value > high)).any(-1), -math.inf)


def _common_shape(value: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> torch.Size:
    """Return the common shape: the batch shape, the number of channels and of components."""
    try:
        if min(value.dim(), logits.dim(), loc.dim() - 1, log_scale.dim() - 1) < 1:
            raise RuntimeError("too few dims")
        of_logits = (*logits.shape[:-1], 1, *logits.shape[-1:])
        return torch.broadcast_shapes((*value.shape, 1), of_logits, loc.shape, log_scale.shape)
    except RuntimeError:
        raise ValueError(
            f"discretized_logistic_mixture_log_prob: the shapes of value {tuple(value.shape)}, "
            f"logits {tuple(logits.shape)}, loc {tuple(loc.shape)} and log_scale "
            f"{tuple(log_scale.shape)} do not match. Pass value of shape (..., C), logits of shape "
            "(..., K), and loc and log_scale of shape (..., C, K)."
        ) from None


def _expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    # The backward pass of an unnecessary expand costs a copy of the gradient.
    return x if x.shape == shape else x.expand(shape)


class _LogProb(torch.autograd.Function):
    """The log mass and, if needed, its gradients, which are computed in the same pass and saved."""

    @staticmethod
    def forward(
        value: Tensor,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        low: int,
        high: int,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *batch_shape, C, K = loc.shape
        N = math.prod(batch_shape)
        bins = _Bins.of(value.reshape(N, C), low, high)
        parameters = logits.reshape(N, K), loc.reshape(N, C, K), log_scale.reshape(N, C, K)
        is_whole = loc.device.type != "cpu" or loc.numel() <= BLOCK_SIZE or is_traced()
        evaluate = _evaluate if is_whole else _evaluate_in_blocks
        log_prob, *gradients = evaluate(bins, *parameters, needs_gradient)
        by_logits, by_loc, by_log_scale = (
            g.reshape(K, *batch_shape, *g.shape[2:]) if needs_gradient else g for g in gradients
        )
        return log_prob.reshape(batch_shape), by_logits, by_loc, by_log_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:4], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 7
        parameters, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        scaled = (
            _Scaled.apply(grad, gradient, x)
            for gradient, x in zip(gradients, parameters, strict=True)
        )
        return None, *scaled, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = (_batch_first(info, *pair) for pair in zip(inputs[:4], in_dims, strict=False))
        output = _LogProb.apply(*tensors, *inputs[4:])
        needs_gradient = inputs[-1]
        return output, (0, *([1 if needs_gradient else None] * 3))


class _Scaled(torch.autograd.Function):
    """The gradient of the log mass times the gradient of the loss.

    It raises an error if it is differentiated. Autograd would otherwise treat it as a constant.
    """

    @staticmethod
    def forward(grad: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        # Components are the first dim of a saved gradient, and the last dim of a parameter.
        gradient = gradient.movedim(0, -1)
        grad = grad.reshape(grad.shape + (1,) * (gradient.dim() - grad.dim()))
        if is_traced() or is_transformed(grad):
            return (gradient * grad).to(x.dtype)
        return torch.mul(gradient, grad, out=x.new_empty(gradient.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> NoReturn:
        raise NotImplementedError(
            "discretized_logistic_mixture_log_prob can only be differentiated once. Second "
            "derivatives are not available."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        grad, gradient, x = (
            _batch_first(info, *pair) for pair in zip(inputs, in_dims, strict=True)
        )
        return _Scaled.apply(grad, gradient.movedim(0, 1), x), 0


def _batch_first(info: Any, x: Tensor, dim: int | None) -> Tensor:
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


class _Bins(NamedTuple):
    """The bins of the values: all quantities that depend only on the value, of shape ``(N, C)``."""

    lower: Tensor
    center: Tensor
    upper: Tensor
    edge: Tensor

    @classmethod
    def of(cls, value: Tensor, low: int, high: int) -> "_Bins":
        """Return the bins of some integers.

        At ``low`` and ``high`` the outer edge is infinite, and ``edge`` is not zero.
        """
        is_low, is_high = value == low, value == high
        return cls(
            (value - 0.5).masked_fill(is_low, -math.inf),
            value.masked_fill(is_low, -math.inf).masked_fill(is_high, math.inf),
            (value + 0.5).masked_fill(is_high, math.inf),
            # The distance to the nearer edge is at least -LARGE. With this shift, the distance to
            # the farther edge is at least LARGE.
            (is_low | is_high).to(value.dtype).mul(-2 * _LARGE),
        )


def _evaluate_in_blocks(
    bins: _Bins, logits: Tensor, loc: Tensor, log_scale: Tensor, needs_gradient: bool
) -> tuple[Tensor, ...]:
    """Return the results of :func:`_evaluate`, computed in blocks that fit into a cache."""
    N, C, K = loc.shape
    shapes = ((N,), (K, N), (K, N, C), (K, N, C)) if needs_gradient else ((N,), (0,), (0,), (0,))
    out = tuple(logits.new_empty(shape) for shape in shapes)
    step = -(-N // -(-loc.numel() // BLOCK_SIZE))
    for start in range(0, N, step):
        block = slice(start, start + step)
        _evaluate(
            _Bins(*(x[block] for x in bins)),
            logits[block],
            loc[block],
            log_scale[block],
            needs_gradient,
            (out[0][block], *(x[:, block] if needs_gradient else x for x in out[1:])),
        )
    return out


def _evaluate(
    bins: _Bins,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    needs_gradient: bool,
    out: Sequence[Tensor | None] = (None,) * 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log mass, of shape ``(N,)``, and its gradients, with components first."""
    log_mass, excess, by_loc, by_log_scale = _evaluate_components(
        bins, loc, log_scale, logits.dtype, needs_gradient
    )
    joint = log_mass.sum(-1) if log_mass.shape[-1] > 1 else log_mass.squeeze(-1)
    logits = _components_first(logits)
    if len(logits) == 1:
        return _combine_one(joint, logits, by_loc, by_log_scale, needs_gradient, out)
    smallest = torch.finfo(joint.dtype).min
    if needs_gradient:
        excess = excess.sum(-1) if excess.shape[-1] > 1 else excess.squeeze(-1)
        from_nearest = excess.add_(logits, alpha=1 / _UNIT).clamp_(min=smallest)
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
        joint.addcmul_(from_nearest, is_beyond.to(joint.dtype).mul_(_UNIT))
    sums = joint.exp_().sum(0)
    by_sums = largest.sub_(total.log_()).add_(sums.log()).masked_fill_(is_beyond, -math.inf)
    log_prob = torch.where(complement > -0.5, complement.log1p(), by_sums, out=out[0])
    if not needs_gradient:
        return log_prob, by_loc, by_loc, by_log_scale
    responsibilities = joint.mul_(sums.reciprocal_())
    return (
        log_prob,
        torch.sub(responsibilities, weights, out=out[1]),
        torch.mul(by_loc, responsibilities.unsqueeze(-1), out=out[2]),
        torch.mul(by_log_scale, responsibilities.unsqueeze(-1), out=out[3]),
    )


def _combine_one(
    joint: Tensor,
    logits: Tensor,
    by_loc: Tensor,
    by_log_scale: Tensor,
    needs_gradient: bool,
    out: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of :func:`_evaluate` for a single component, which has all the weight."""
    no_weight = logits.sub_(logits)  # zero, but NaN if there is no weight to normalise
    is_beyond = joint == torch.finfo(joint.dtype).min
    log_prob = joint.add_(no_weight).masked_fill_(is_beyond, -math.inf).squeeze(0)
    found = log_prob, no_weight if needs_gradient else by_loc, by_loc, by_log_scale
    a, b, c, d = (x if to is None else to.copy_(x) for x, to in zip(found, out, strict=True))
    return a, b, c, d


def _evaluate_components(
    bins: _Bins, loc: Tensor, log_scale: Tensor, dtype: torch.dtype, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log mass of each component and channel, ``(K, N, C)``, and its derivatives.

    The second result is the distance to a bin that does not contain the location, in a larger unit.
    Each operation is a pass over memory, so most of them work in place.
    """
    excess = by_loc = by_log_scale = loc.new_empty(0)
    largest = torch.finfo(dtype).max
    loc = _components_first(loc)
    t = _components_first(log_scale).neg_().exp_().to(dtype)
    if needs_gradient:
        offset = (bins.center - loc).to(dtype)
        slope = offset.abs().mul_(t).mul_(-2).expm1_().copysign_(offset).mul_(t)
        del offset
    # Subtract each edge separately: digits would cancel in |c| - t / 2.
    nearer = (bins.lower - loc).clamp_(min=loc.sub_(bins.upper)).to(dtype)
    del loc
    if needs_gradient:
        excess = nearer.clamp(min=0, max=largest).mul_(-1 / _UNIT).mul_(t)
    nearer.mul_(t).clamp_(min=-_LARGE, max=largest)
    exponent = bins.edge.to(dtype) - t
    minus_farther = (exponent - nearer).clamp_(min=-_LARGE)
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


def _components_first(x: Tensor) -> Tensor:
    # This is several times faster than a transposed copy.
    return torch.stack(x.unbind(-1))
