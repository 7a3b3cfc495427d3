import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext.infer.arguments import check_integer, check_real
from pyro_ext.infer.streaming import ParticleStream, data_points
from pyro_ext.ops import MIN_DRAWS, WeightStatistics


@dataclass(frozen=True)
class Evidence:
    """An importance-sampling estimate of the log evidence, with what tells whether to trust it.

    Every tensor has one entry for each element of the plates that are common to all sites (for
    each data point of a VAE), and no dims where there is no such plate; they are in float64.

    :ivar log_evidence: the estimate of log p(x), in nats; biased down by about half the square of
        the standard error.
    :ivar std_error: its standard error by the delta method; NaN for one draw.
    :ivar ess: the effective sample size, between 1 and ``num_samples``.
    :ivar pareto_k: the Pareto shape of the largest weights; above 0.7 do not trust the estimate.
    :ivar jackknife: from order to the jackknife estimate, over single draws for up to 1,024 of
        them and over the means of up to 1,024 blocks for more; NaN where these are too few.
    :ivar outer: the log-probability of observed and factor sites outside of the common plates,
        which depends on no latent site: the total is ``log_evidence.sum() + outer``. Zero where
        there are no common plates, for it is then part of ``log_evidence``.
    :ivar num_samples: the number of draws.
    """

    log_evidence: Tensor
    std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    jackknife: dict[int, Tensor]
    outer: float
    num_samples: int

    @property
    def total(self) -> float:
        """The log evidence of all data points together, ``outer`` included."""
        return self.log_evidence.sum().item() + self.outer

    @property
    def total_std_error(self) -> float:
        """The standard error of :attr:`total`: draws of different data points are independent."""
        return self.std_error.square().sum().sqrt().item()

    def bits_per_dim(self, num_dims: int) -> Tensor:
        """Minus the log evidence in bits for each dimension of a data point.

        :param int num_dims: the number of dimensions, such as height x width x channels.
        :raises ValueError: if ``num_dims`` is not positive.
        """
        if num_dims < 1:
            raise ValueError(f"bits_per_dim: expected num_dims >= 1, got {num_dims}.")
        return -self.log_evidence / (num_dims * math.log(2))

    def __repr__(self) -> str:
        n = self.log_evidence.numel()
        mean_error = self.std_error.square().sum().sqrt() / n
        what = f"mean of {n} data points" if self.log_evidence.dim() else "joint"
        lines = [
            f"Evidence({what}, {self.num_samples} draws)",
            f"  log evidence   {self.log_evidence.mean():.4f} +- {mean_error:.4f} nats",
            *(
                f"  jackknife {order}    {estimate.mean():.4f}"
                for order, estimate in self.jackknife.items()
            ),
            f"  ess            {self.ess.mean():.1f} (smallest {self.ess.min():.1f})",
        ]
        if self.num_samples < MIN_DRAWS:
            lines.append(f"  Pareto k       needs {MIN_DRAWS} draws")
        else:
            lines.append(
                f"  Pareto k       {self.pareto_k.median():.2f} "
                f"(median; above 0.7: {(self.pareto_k > 0.7).sum()} of {n})"
            )
        if self.outer:
            lines.append(f"  outer          {self.outer:.4f} (once, beside the data points)")
        return "\n".join(lines)


@torch.no_grad()
def estimate_evidence(
    model: Callable,
    guide: Callable | None = None,
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    jackknife_orders: Iterable[int] = (1,),
    target_std_error: float | None = None,
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> Evidence:
    r"""Estimates the log evidence by importance sampling with the guide as proposal.

    .. math::

        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^{S} w_s, \qquad
        \mathrm{SE} = \sqrt{\frac{1}{S} \Bigl( \frac{\overline{w^2}}{\bar w^2} - 1 \Bigr)}, \qquad
        \mathrm{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}

    Nothing is differentiated. The programs run on ``chunk_size`` particles at a time, and the
    weights go into running statistics in float64, so that memory hardly grows with S. The draws
    depend on ``chunk_size``: torch fills a chunk's tensors one after the other, so that other
    chunks get other numbers from the same seed. The subsampling scale, and a scale of the user
    that is the same at every site, are left out: the evidence is that of the data seen.

    An interrupt (Ctrl-C) ends the sampling, with a warning, and the draws so far are the result.

    Sources: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders; Owen
    (2013), Monte Carlo Theory, Methods and Examples, chapter 9; Nowozin (2018), Debiasing
    Evidence Approximations.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, likewise. None for the prior as proposal, which is plain Monte Carlo.
    :param args: positional arguments of both.
    :param int num_samples: the number of draws S >= 1.
    :param int chunk_size: how many particles run at once; at most 100 by default. 1 suits
        programs that cannot take the extra dim of vectorised particles.
    :param jackknife_orders: orders m < S of the jackknife estimates.
    :param float target_std_error: stop, after 100 draws or more, as soon as the standard error of
        each data point is no larger; None to draw all.
    :param bool progress_bar: whether to show one.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: an :class:`Evidence`; under a subsampled plate, for one minibatch.
    :raises ValueError: if an argument is out of range, if log weights are NaN, if all weights of
        a data point are zero, and where :class:`MultiSampleELBO` raises it.

    It warns where a Pareto k is above 0.7.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
    >>> pyro.set_rng_seed(0)
    >>> evidence = estimate_evidence(model, guide, torch.tensor([0.0, 1.0]), num_samples=10_000)
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0, 1.0]))
    >>> bool(((evidence.log_evidence - exact).abs() < 4 * evidence.std_error).all())
    True
    """
    stream = ParticleStream(
        "estimate_evidence",
        model,
        guide,
        num_samples,
        chunk_size,
        100,
        max_plate_nesting,
        progress_bar,
    )
    if target_std_error is not None:
        check_real("estimate_evidence", "target_std_error", target_std_error, 0.0, math.inf)
    orders = _checked_orders(jackknife_orders, num_samples)
    return _evidence(*_accumulate(stream, args, kwargs, target_std_error), orders)


def _accumulate(
    stream: ParticleStream,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target_std_error: float | None,
) -> tuple[WeightStatistics, float]:
    """The statistics of the weights, and the part outside of the plates."""
    statistics = WeightStatistics(stream.num_samples)
    outer = 0.0
    try:
        for particles, num_used, bar in stream.draw(args, kwargs):
            log_w = particles.log_w[:num_used]
            statistics.update(log_w)
            outer = float(particles.outer)
            if stream.progress_bar:
                bar.set_postfix_str(f"{statistics.log_mean.mean():.4f} nats")
            if target_std_error is not None and _is_reached(statistics, target_std_error):
                break
    except KeyboardInterrupt:
        if statistics.num_samples == 0:
            raise
        warnings.warn(
            f"estimate_evidence was interrupted: the result is that of "
            f"{statistics.num_samples} of {stream.num_samples} draws.",
            stacklevel=3,
        )
    return statistics, outer


def _is_reached(statistics: WeightStatistics, target_std_error: float) -> bool:
    is_small = statistics.std_error <= target_std_error
    return statistics.num_samples >= 100 and bool(is_small.all())


def _evidence(statistics: WeightStatistics, outer: float, orders: tuple[int, ...]) -> Evidence:
    log_evidence = statistics.log_mean
    if log_evidence.isneginf().any():
        raise ValueError(
            "estimate_evidence: expected draws with weights above zero, and all "
            f"{statistics.num_samples} weights are zero{data_points(log_evidence.isneginf())}. The "
            "guide's support misses what the data allow: use a wider guide, or more draws."
        )
    # Weights that differ by rounding have a tail of nothing else.
    is_heavy = (statistics.pareto_k > 0.7) & (statistics.ess < 0.99 * statistics.num_samples)
    if statistics.num_samples >= MIN_DRAWS and is_heavy.any():
        warnings.warn(
            f"estimate_evidence: Pareto k is above 0.7{data_points(is_heavy)}: a few draws carry "
            "the estimate, and its standard error is too small. Widen the guide or train it "
            "further; more draws help slowly.",
            stacklevel=3,
        )
    # Without common plates there is one total, which includes what does not depend on the draw.
    constant, outer = (0.0, outer) if log_evidence.dim() else (outer, 0.0)
    return Evidence(
        log_evidence=log_evidence + constant,
        std_error=statistics.std_error,
        ess=statistics.ess,
        pareto_k=statistics.pareto_k,
        jackknife={order: statistics.jackknife(order) + constant for order in orders},
        outer=outer,
        num_samples=statistics.num_samples,
    )


def _checked_orders(jackknife_orders: Iterable[int], num_samples: int) -> tuple[int, ...]:
    if not isinstance(jackknife_orders, Iterable):
        raise ValueError(
            f"estimate_evidence: expected jackknife_orders to hold integers, got "
            f"{jackknife_orders!r}."
        )
    orders = tuple(jackknife_orders)
    for order in orders:
        check_integer("estimate_evidence", "each of jackknife_orders", order, 0)
        if order >= num_samples:
            raise ValueError(
                f"estimate_evidence: expected jackknife_orders below num_samples={num_samples}, "
                f"got {orders}; for one draw, pass jackknife_orders=()."
            )
    return orders
