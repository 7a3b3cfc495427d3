import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer
from pyro_ext.infer.handlers import SharedSubsamples, is_delta
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.not_finite import raise_not_finite
from pyro_ext.infer.particles import Particles
from pyro_ext.ops import MIN_DRAWS, accumulation_dtype, jackknife, log_mean_exp, pareto_k


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
    :ivar jackknife: from order to the jackknife estimate over all draws.
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
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    jackknife_orders: Iterable[int] = (1,),
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> Evidence:
    r"""Estimates the log evidence by importance sampling with the guide as proposal.

    .. math::

        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^{S} w_s, \qquad
        \mathrm{SE} = \sqrt{\frac{1}{S} \Bigl( \frac{\overline{w^2}}{\bar w^2} - 1 \Bigr)}, \qquad
        \mathrm{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}

    Nothing is differentiated. The programs run on ``chunk_size`` particles at a time; the log
    weights are kept in float64, S numbers for each data point. The subsampling scale, and a scale
    of the user that is the same at every site, are left out: the evidence is that of the data seen.

    Sources: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders; Owen
    (2013), Monte Carlo Theory, Methods and Examples, chapter 9; Nowozin (2018), Debiasing
    Evidence Approximations.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, likewise.
    :param args: positional arguments of both.
    :param int num_samples: the number of draws S >= 1.
    :param int chunk_size: how many particles run at once; at most 100 by default. 1 suits
        programs that cannot take the extra dim of vectorised particles.
    :param jackknife_orders: orders m < S of the jackknife estimates over all draws; order 2 costs
        O(S^2).
    :param bool progress_bar: whether to show one.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: an :class:`Evidence`; under a subsampled plate, for one minibatch.
    :raises ValueError: if an argument is out of range, if log weights are NaN, and where
        :class:`MultiSampleELBO` raises it.
    :raises TooManySubsetsError: if an order has too many subsets of the S draws.

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
    check_integer("estimate_evidence", "num_samples", num_samples, 1)
    chunk_size = min(num_samples, 100) if chunk_size is None else chunk_size
    check_integer("estimate_evidence", "chunk_size", chunk_size, 1)
    orders = _checked_orders(jackknife_orders, num_samples)
    # Never fewer than two at once: it takes two particles to see what depends on the particle.
    elbo = ImportanceWeightedELBO(
        max(chunk_size, 2), vectorize_particles=chunk_size > 1, max_plate_nesting=max_plate_nesting
    )
    log_w, outer = _draw_log_weights(elbo, (model, guide), args, kwargs, num_samples, progress_bar)
    relative_w = num_samples * log_w.softmax(0)
    log_evidence = log_mean_exp(log_w)
    # Without common plates there is one total, which includes what does not depend on the draw.
    constant, outer = (0.0, outer) if log_evidence.dim() else (outer, 0.0)
    return Evidence(
        log_evidence=log_evidence + constant,
        std_error=_standard_error(relative_w),
        ess=num_samples / relative_w.square().mean(0),
        pareto_k=pareto_k(log_w),
        jackknife={order: jackknife(log_w, order) + constant for order in orders},
        outer=outer,
        num_samples=num_samples,
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


def _warn_of_points(particles: Particles) -> None:
    site: Any
    for name, site in particles.guide_traces[0].iter_stochastic_nodes():
        if not is_delta(site["fn"]):
            continue
        draws = site["value"]
        if len(particles.guide_traces) > 1:
            traces: Any = [trace for trace in particles.guide_traces if name in trace.nodes]
            draws = torch.stack([trace.nodes[name]["value"] for trace in traces])
        if bool((draws == draws[:1]).all()):
            warnings.warn(
                f"The guide puts site '{name}' at one point (Delta): expected a distribution. "
                "The result is the density of x and that point together, not the evidence.",
                stacklevel=2,
            )


def _standard_error(relative_w: Tensor) -> Tensor:
    """The delta method, for weights relative to their mean; one draw tells nothing."""
    S = relative_w.shape[0]
    error = ((relative_w - 1).square().mean(0) / S).sqrt()
    return error if S > 1 else error.fill_(math.nan)


def _draw_log_weights(
    elbo: ImportanceWeightedELBO,
    programs: tuple[Callable, Callable],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    progress_bar: bool,
) -> tuple[Tensor, float]:
    """Log weights of shape ``(num_samples, *common)``, and the part outside of the plates."""
    chunk_size = elbo.num_particles
    subsamples = SharedSubsamples()
    chunks: list[Tensor] = []
    with tqdm(total=num_samples, desc="evidence", unit="draw", disable=not progress_bar) as bar:
        for start in range(0, num_samples, chunk_size):
            rest = num_samples - start
            num_particles = max(2, min(chunk_size, rest))
            particles = elbo.trace_particles(*programs, args, kwargs, subsamples, num_particles)
            log_w = particles.log_w[:rest].to(accumulation_dtype(particles.log_w.device))
            if log_w.isnan().any():
                raise_not_finite("estimate_evidence: a log weight", math.nan, particles)
            if start == 0:
                _warn_of_points(particles)
            chunks.append(log_w)
            bar.update(len(log_w))
    return torch.cat(chunks), float(particles.outer)
