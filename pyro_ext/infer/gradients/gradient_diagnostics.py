from dataclasses import dataclass
from typing import Any

from pyro_ext._deprecated import renamed_arguments
from pyro_ext._figures import axes_or_new


@dataclass(frozen=True)
class GradientSummary:
    r"""The signal and the noise of an estimator's gradient for a group of parameters.

    Let the vector g be a draw of the gradient. There are R draws.

    :ivar mean: the norm of the mean, :math:`\lVert \mathrm E g \rVert`. It is corrected for noise:
        the variance of the mean of R draws is subtracted from the squared norm. If the result is
        negative, ``mean`` is 0.
    :ivar std: the square root of the summed variances, :math:`\sqrt{\mathrm{tr}\,\mathrm{Cov}\,g}`.
    """

    mean: float
    std: float

    @property
    def signal_to_noise(self) -> float:
        """The mean divided by the standard deviation; NaN if both are 0."""
        if self.std == 0:
            return float("inf") if self.mean else float("nan")
        return self.mean / self.std


@dataclass(frozen=True)
class GradientDiagnostics:
    """A table with one row for each estimator, the result of :func:`gradient_diagnostics`.

    :ivar model: a dict from the name of an estimator to the summary for the model's parameters.
    :ivar guide: a dict from the name of an estimator to the summary for the guide's parameters. A
        parameter that model and guide share is part of both summaries.
    :ivar seconds: a dict from the name of an estimator to the median time of one loss with its
        gradients, in seconds.
    :ivar num_repeats: the number of draws of each gradient.

    >>> from pyro_ext.infer.gradients.gradient_diagnostics import GradientSummary
    >>> model, guide = GradientSummary(mean=3.0, std=1.5), GradientSummary(mean=1.0, std=4.0)
    >>> found = GradientDiagnostics({"iwae": model}, {"iwae": guide}, {"iwae": 0.002}, 100)
    >>> found.model["iwae"].signal_to_noise, found.guide["iwae"].signal_to_noise
    (2.0, 0.25)
    """

    model: dict[str, GradientSummary]
    guide: dict[str, GradientSummary]
    seconds: dict[str, float]
    num_repeats: int

    def __repr__(self) -> str:
        width = max(map(len, self.seconds))
        lines = [
            f"{'':{width}}  {'model: mean':>12} {'std':>10} {'SNR':>8}  "
            f"{'guide: mean':>12} {'std':>10} {'SNR':>8}  {'ms':>8}"
        ]
        for name, seconds in self.seconds.items():
            cells = "  ".join(
                f"{group[name].mean:>12.4g} {group[name].std:>10.4g} "
                f"{group[name].signal_to_noise:>8.3g}"
                for group in (self.model, self.guide)
            )
            lines.append(f"{name:{width}}  {cells}  {1e3 * seconds:>8.2f}")
        return "\n".join(lines)

    @renamed_arguments(axes="ax")
    def plot(self, ax: Any = None) -> Any:
        """Plot the signal-to-noise ratios of model and guide as bars.

        :param ax: the matplotlib axes; None for new axes.
        :returns: the axes.
        """
        ax = axes_or_new(ax)
        names = list(self.seconds)
        for offset, label, group in ((-0.2, "model", self.model), (0.2, "guide", self.guide)):
            ratios = [group[name].signal_to_noise for name in names]
            ax.barh([i + offset for i in range(len(names))], ratios, height=0.4, label=label)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set(xlabel="signal-to-noise ratio of the gradient", xscale="log")
        ax.legend()
        return ax
