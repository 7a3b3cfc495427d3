import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer, check_real
from pyro_ext.infer.data_blocks import DataBlock
from pyro_ext.infer.evidence import Evidence
from pyro_ext.infer.evidence_state import BlockState
from pyro_ext.infer.hmc import ChainState, transition
from pyro_ext.infer.importance_sampling import checked_orders, warn_of_heavy_tails
from pyro_ext.infer.proposals import PriorProposal
from pyro_ext.infer.streaming import data_points
from pyro_ext.infer.unconstrained import UnconstrainedPrograms
from pyro_ext.ops import accumulation_dtype, log_mean_exp

NAME = "annealed_importance_sampling"
#: How fast step sizes follow the acceptance, per transition.
ADAPTATION_RATE = 0.3
#: Transitions at the first temperature before step sizes count.
NUM_WARMUP = 20


@dataclass(frozen=True, repr=False)
class AnnealedEvidence(Evidence):
    """Evidence by annealed importance sampling; ``num_samples`` counts the chains.

    :ivar temperatures: the inverse temperatures, from 0 to 1.
    :ivar acceptance: the mean acceptance probability of the transitions, over all but the first
        and last inverse temperatures and over chains; NaN if there are none.
    :ivar upper: an estimate from above, by chains in reverse from an exact sample; None without.
        It lies more than b below log p(x) with probability at most e^-b.
    """

    temperatures: tuple[float, ...]
    acceptance: Tensor
    upper: Tensor | None

    def to_dataset(self) -> Any:
        """As :meth:`Evidence.to_dataset`, with ``acceptance`` and ``upper`` where there is one."""
        dataset = super().to_dataset()
        plates = dataset["log_evidence"].dims
        dataset["acceptance"] = (plates, self.acceptance.cpu().numpy())
        if self.upper is not None:
            dataset["upper"] = (plates, self.upper.cpu().numpy())
        return dataset

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.upper is not None:
            lines.append(f"  upper          {self.upper.mean():.4f} (reverse chains)")
        mean, smallest = self.acceptance.mean(), self.acceptance.min()
        lines.append(f"  acceptance     {mean:.2f} (smallest {smallest:.2f})")
        return "\n".join(lines)


@torch.no_grad()
def annealed_importance_sampling(
    model: Callable,
    guide: Callable | None = None,
    *args: Any,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog_steps: int = 10,
    ladder: str | Sequence[float] = "sigmoid",
    target_acceptance: float = 0.8,
    exact_sample: dict[str, Tensor] | None = None,
    chunk_size: int | None = None,
    jackknife_orders: Iterable[int] = (),
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> AnnealedEvidence:
    r"""Estimates the log evidence by chains from the guide to the posterior.

    .. math::

        \log w = \sum_{t=0}^{T-1} (\beta_{t+1} - \beta_t)
            \bigl( \log p(x, z_t) - \log q(z_t) \bigr), \qquad z_0 \sim q, \quad
        z_t \sim \mathcal{T}_t(\cdot \mid z_{t-1}), \qquad 0 = \beta_0 < \dots < \beta_T = 1

    The transition :math:`\mathcal{T}_t` is Hamiltonian Monte Carlo in unconstrained space, and
    leaves :math:`p(x, z)^{\beta_t} q(z)^{1 - \beta_t}` invariant, so that :math:`E w = p(x)` for
    any number of temperatures. With many, the weights vary little even where the guide is far from
    the posterior; that is why the estimate can judge others. Chains and data points run at once,
    and each is accepted by itself. A first pass, which counts for nothing else, finds a step size
    for each temperature and data point; steps are relative to the spread of the guide's draws.

    With an ``exact_sample`` from the posterior, chains in reverse give an estimate from above:
    :math:`E \, w^{-1} = p(x)^{-1}` for these. One such sample comes for free with data that the
    model has simulated (bidirectional Monte Carlo); the two estimates then bracket the evidence.

    Sources: Neal (2001), Annealed Importance Sampling; Wu, Burda, Salakhutdinov and Grosse (2017),
    On the Quantitative Analysis of Decoder-Based Generative Models; Grosse, Ghahramani and Adams
    (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo.

    :param model: the model, a callable with Pyro primitives; its modules in evaluation mode.
    :param guide: the guide, likewise, with the support of the posterior. None for the prior.
    :param args: positional arguments of both.
    :param int num_chains: the number of chains C >= 1 for each data point.
    :param int num_temperatures: the number of steps T >= 1 from the guide to the posterior.
    :param int num_leapfrog_steps: leapfrog steps in a transition, each with one gradient.
    :param ladder: where the inverse temperatures lie: ``"sigmoid"``, denser at both ends,
        ``"geometric"``, denser at the guide, or the numbers themselves, from 0 to 1, in place of
        ``num_temperatures``.
    :param float target_acceptance: the acceptance probability that step sizes are made for.
    :param dict exact_sample: a sample from the posterior, by the names of the guide's latent sites.
    :param int chunk_size: how many chains run at once; at most 100 by default.
    :param jackknife_orders: orders m < C of the jackknife estimates.
    :param bool progress_bar: whether to show one.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: an :class:`AnnealedEvidence`. An interrupt ends the sampling, with a warning, and the
        chunks of chains that were complete are the result.
    :raises ValueError: if an argument is out of range, if a latent site is discrete or has no map
        to unconstrained space, if weights are NaN, if all weights of a data point are zero, and
        where :class:`MultiSampleELBO` raises it.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> pyro.set_rng_seed(0)
    >>> simulated = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(torch.zeros(3))
    >>> x, z = simulated.nodes["x"]["value"], simulated.nodes["z"]["value"]
    >>> found = annealed_importance_sampling(
    ...     model, None, x, exact_sample={"z": z}, num_temperatures=30
    ... )
    >>> exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    >>> bool(((found.log_evidence - exact).abs() < 0.5).all() and (found.upper > exact - 0.5).all())
    True
    """
    for name, value in (
        ("num_chains", num_chains),
        ("num_temperatures", num_temperatures),
        ("num_leapfrog_steps", num_leapfrog_steps),
        ("chunk_size", 1 if chunk_size is None else chunk_size),
    ):
        check_integer(NAME, name, value, 1)
    orders = checked_orders(NAME, jackknife_orders, num_chains)
    check_real(NAME, "target_acceptance", target_acceptance, 0.05, 0.99)
    betas = _inverse_temperatures(ladder, num_temperatures)
    programs = UnconstrainedPrograms(
        NAME,
        model,
        PriorProposal(model) if guide is None else guide,
        DataBlock(args, kwargs),
        max_plate_nesting,
    )
    size = max(2, min(num_chains, chunk_size or 100))
    num_passes = -(-num_chains // size) * (1 if exact_sample is None else 2)
    total = num_passes * (len(betas) - 2) + len(betas) - 2 + NUM_WARMUP
    with tqdm(total=total, desc=NAME, unit="transition", disable=not progress_bar) as bar:
        annealer = _Annealer(programs, betas, num_leapfrog_steps, target_acceptance, bar)
        annealer.adapt(size)
        evidence = annealer.evidence(num_chains, size, orders, exact_sample)
    if num_chains >= 100:  # the Pareto k of fewer says little
        warn_of_heavy_tails(NAME, evidence, "Use more temperatures, or more leapfrog steps.")
    return evidence


class _Annealer:
    """Runs the chains, with step sizes that a first pass has found."""

    def __init__(
        self,
        programs: UnconstrainedPrograms,
        betas: tuple[float, ...],
        num_leapfrog_steps: int,
        target_acceptance: float,
        bar: "tqdm[Any]",
    ) -> None:
        self.programs = programs
        self.betas = betas
        self.num_leapfrog_steps = num_leapfrog_steps
        self.target_acceptance = target_acceptance
        self.bar = bar
        self.scales: dict[str, Tensor] = {}
        self.step_sizes: list[Tensor] = []

    def adapt(self, num_chains: int) -> None:
        """Finds the step sizes, by chains that follow their acceptance."""
        state = self._start(num_chains)
        for name, position in state.positions.items():
            spread = position.std(0, keepdim=True)
            is_known = spread.isfinite() & (spread > 0) & (num_chains >= 8)
            self.scales[name] = spread.where(is_known, 1.0)
        log_step = torch.full_like(state.densities.log_p[0], math.log(0.3))
        inner = self.betas[1:-1]
        for index, beta in enumerate(inner[:1] * NUM_WARMUP + inner):
            state, acceptance = self._step(state, beta, log_step.exp())
            log_step = log_step + ADAPTATION_RATE * (acceptance - self.target_acceptance)
            if index >= NUM_WARMUP:
                self.step_sizes.append(log_step.exp())

    def evidence(
        self,
        num_chains: int,
        chunk_size: int,
        orders: tuple[int, ...],
        exact_sample: dict[str, Tensor] | None,
    ) -> AnnealedEvidence:
        """The weights of all chains, or of the chunks that are complete at an interrupt."""
        programs = self.programs
        names = tuple(plate.name for plate in programs.plates)
        block = BlockState(names, 0, programs.outer)
        acceptances, reverse = [], []
        try:
            for start in range(0, num_chains, chunk_size):
                num_used = min(chunk_size, num_chains - start)
                log_w, acceptance = self._anneal(max(2, num_used))
                block.add(log_w[:num_used], orders, num_chains, 0)
                acceptances.append(acceptance)
                if exact_sample is not None:
                    log_w, _ = self._anneal(max(2, num_used), exact_sample)
                    reverse.append(log_w[:num_used])
        except KeyboardInterrupt:
            if not acceptances:
                raise
            warnings.warn(
                f"{NAME} was interrupted: the result is that of {block.num_samples} of "
                f"{num_chains} chains.",
                stacklevel=4,
            )
        evidence = block.to_evidence(orders)
        is_zero = evidence.log_evidence.isneginf()
        if is_zero.any():
            raise ValueError(
                f"{NAME}: expected chains with weights above zero, and all {num_chains} weights "
                f"are zero{data_points(is_zero)}. The guide's support misses what the data allow."
            )
        constant = 0.0 if names else programs.outer
        return AnnealedEvidence(
            **vars(evidence),
            temperatures=self.betas,
            acceptance=torch.stack(acceptances).mean(0),
            upper=constant - log_mean_exp(-torch.cat(reverse)) if reverse else None,
        )

    def _anneal(
        self, num_chains: int, exact_sample: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log weights, ``(C, *common)``, and the mean acceptance; in reverse from a sample."""
        state = self._start(num_chains, exact_sample)
        log_w = torch.zeros_like(
            state.densities.log_p, dtype=accumulation_dtype(state.densities.log_p.device)
        )
        acceptances = [torch.full_like(log_w[0], math.nan)]
        last = len(self.betas) - 2
        for index in range(last + 1):
            t = index if exact_sample is None else last - index
            ratio = state.densities.log_w.to(log_w.dtype)
            log_w = log_w + (self.betas[t + 1] - self.betas[t]) * ratio
            if index < last:
                inner = t if exact_sample is None else t - 1
                step_size = self.step_sizes[inner]
                state, acceptance = self._step(state, self.betas[inner + 1], step_size)
                acceptances.append(acceptance.to(log_w.dtype))
        return log_w, torch.stack(acceptances).nanmean(0)

    def _start(self, num_chains: int, exact_sample: dict[str, Tensor] | None = None) -> ChainState:
        positions = self.programs.draw(num_chains, exact_sample)
        return ChainState(positions, self.programs(positions))

    def _step(self, state: ChainState, beta: float, step_size: Tensor) -> tuple[ChainState, Tensor]:
        state, acceptance = transition(
            self.programs, state, beta, step_size, self.scales, self.num_leapfrog_steps
        )
        self.bar.update()
        return state, acceptance.mean(0)


def _inverse_temperatures(
    ladder: str | Sequence[float], num_temperatures: int
) -> tuple[float, ...]:
    fractions = [t / num_temperatures for t in range(num_temperatures + 1)]
    if ladder == "sigmoid":
        # The logistic function from -4 to 4, stretched to reach 0 and 1.
        edge = math.tanh(2)
        return tuple((math.tanh(2 * (2 * t - 1)) / edge + 1) / 2 for t in fractions)
    if ladder == "geometric":
        # From 0.001 to 1 with a constant ratio.
        rest = num_temperatures - 1
        return (0.0, *(1000.0 ** (t / rest - 1) for t in range(rest)), 1.0)
    if isinstance(ladder, str) or not isinstance(ladder, Iterable):
        raise ValueError(
            f"{NAME}: expected ladder to be 'sigmoid', 'geometric' or inverse temperatures, got "
            f"{ladder!r}."
        )
    betas = tuple(map(float, ladder))
    is_rising = all(a < b for a, b in pairwise(betas))
    if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not is_rising:
        raise ValueError(
            f"{NAME}: expected ladder to rise from 0 to 1, each above the one before, got {betas}."
        )
    return betas
