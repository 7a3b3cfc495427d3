"""The evidence of sequential Monte Carlo, with the statistics of each inverse temperature."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext._figures import axes_or_new
from pyro_ext.infer.annealing.flags import MIN_ACCEPTANCE, gap_flags, start_flags
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.tracing.failures import data_points

#: The spread of the runs' log evidences above which the standard error says little.
MAX_SPREAD = 1.0


@dataclass(frozen=True, repr=False)
class TemperedEvidence(Evidence):
    """The evidence from several runs of sequential Monte Carlo.

    It has the attributes of :class:`Evidence`, and the attributes below. Its draws are the runs:
    ``num_samples`` is their number R, and ``std_error`` comes from the differences between them.
    T is the number of inverse temperatures above 0.

    :ivar num_particles: the number N of particles of a run.
    :ivar by_run: the log evidence of each run, of shape ``(R, *common)``.
    :ivar temperatures: the inverse temperatures, of shape ``(T, *common)``.
    :ivar run_ess: the effective sample size of each run before resampling, of shape
        ``(T, R, *common)``.
    :ivar acceptance: the mean acceptance probability of each run, of shape ``(T, R, *common)``.
    :ivar num_ancestors: the number of first ancestors that the particles of each run have, of shape
        ``(T, R, *common)``.
    :ivar start: where the particles start, "guide" or "prior".
    :ivar other: the evidence of runs from the other start; None if there are none.
    :ivar upper: an estimate from above, in nats, from runs through an exact sample; None without
        such a sample. The probability that this estimate lies more than b below log p(x) is at most
        e^-b.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import sequential_monte_carlo
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
    >>> evidence = sequential_monte_carlo(model, num_particles=64, num_runs=4).evidence
    >>> evidence.by_run.shape, evidence.temperatures[-1].item(), evidence.flags
    (torch.Size([4]), 1.0, {})
    """

    num_particles: int
    by_run: Tensor
    temperatures: Tensor
    run_ess: Tensor
    acceptance: Tensor
    num_ancestors: Tensor
    start: str
    other: Evidence | None
    upper: Tensor | None

    @property
    def flags(self) -> dict[str, str]:
        """Reasons not to trust the estimate, by a short name; empty if none is known.

        Beside those of :class:`Evidence`, there are ``spread`` (the log evidences of the runs have
        a standard deviation above 1), ``collapse`` (a run has an effective sample size below N / 8
        at an inverse temperature), ``acceptance`` (below 0.3 at an inverse temperature),
        ``prior`` (runs from the prior find more evidence, so the guide misses a part of the
        posterior), ``guide`` (the result comes from the prior, and runs from the guide find more
        evidence of some data points) and ``gap`` (runs through the exact sample find more evidence,
        by more than 0.1 nats and noise explain).
        """
        spread = self.by_run.std(0) > MAX_SPREAD
        collapsed = (self.run_ess < self.num_particles / 8).any(1).any(0)
        stuck = self.acceptance.mean(1).amin(0) < MIN_ACCEPTANCE
        flags = super().flags
        if spread.any():
            flags["spread"] = (
                f"The log evidences of the runs differ by more than {MAX_SPREAD:.0f} "
                f"nat{data_points(spread)}. Use more particles."
            )
        if collapsed.any():
            flags["collapse"] = (
                f"A few particles dominate a run{data_points(collapsed)}. Use more particles."
            )
        if stuck.any():
            flags["acceptance"] = (
                f"Fewer than {MIN_ACCEPTANCE:.0%} of the transitions are accepted"
                f"{data_points(stuck)}. Reparameterise the model."
            )
        flags |= gap_flags(self, self.upper, "Leave the guide out, or use more particles.")
        if self.other is not None:
            pair = (self, self.other)
            guide, prior = pair if self.start == "guide" else pair[::-1]
            flags |= start_flags(guide, prior, self.start)
        return flags

    def to_dataset(self) -> Any:
        """Return the dataset of :meth:`Evidence.to_dataset` with the statistics of the runs.

        These have the extra dims ``run`` and ``temperature``. There is also ``upper``, if it is not
        None.
        """
        dataset = super().to_dataset()
        plates = dataset["log_evidence"].dims
        dataset["by_run"] = (("run", *plates), self.by_run.cpu().numpy())
        dataset["temperatures"] = (("temperature", *plates), self.temperatures.cpu().numpy())
        for name in ("run_ess", "acceptance", "num_ancestors"):
            values = getattr(self, name).cpu().numpy()
            dataset[name] = (("temperature", "run", *plates), values)
        if self.upper is not None:
            dataset["upper"] = (plates, self.upper.cpu().numpy())
        return dataset

    def plot_temperatures(self, ax: Any = None) -> Any:
        """Plot effective sample size, acceptance and ancestors at each inverse temperature.

        Each line is relative to its largest possible value, and shows the run or the data point
        with the smallest value. This needs matplotlib.

        :param ax: the matplotlib axes; None for new axes.
        :returns: the axes.
        """
        ax = axes_or_new(ax)
        size = len(self.temperatures)
        steps = torch.arange(1, size + 1)
        lines = {
            "effective sample size": self.run_ess / self.num_particles,
            "acceptance": self.acceptance,
            "ancestors": self.num_ancestors / self.num_particles,
        }
        for label, values in lines.items():
            ax.plot(steps, values.reshape(size, -1).amin(1).cpu().numpy(), "o-", label=label, ms=3)
        betas = self.temperatures.reshape(size, -1).double().mean(1)
        ax.plot(steps, betas.cpu().numpy(), color="grey", label="inverse temperature")
        ax.set(xlabel="step", ylabel="smallest of all runs", ylim=(0, 1.05))
        ax.legend()
        return ax

    def __repr__(self) -> str:
        mean, smallest = self.acceptance.mean(), self.acceptance.mean(1).min()
        lines = [super().__repr__().replace("draws)", "runs)")]
        if self.upper is not None:
            lines.append(f"  upper          {self.upper.mean():.4f} (exact sample)")
        lines.append(f"  temperatures   {len(self.temperatures)} (from the {self.start})")
        lines.append(f"  acceptance     {mean:.2f} (smallest {smallest:.2f})")
        return "\n".join(lines)
