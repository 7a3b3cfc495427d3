from dataclasses import dataclass
from typing import Any

from pyro_ext._deprecated import renamed_arguments
from pyro_ext._figures import axes_or_new


@dataclass(frozen=True)
class GradientSummary:
    r"""How well an estimator knows the gradient of a group of parameters.

    With g a draw of the gradient, a vector, over R draws:

    :ivar mean: the norm of the mean, :math:`\lVert \mathrm E g \rVert`; the noise that R draws
        leave in it is taken off its square, and it is 0 where nothing else is left.
    :ivar std: the root of the summed variances, :math:`\sqrt{\mathrm{tr}\,\mathrm{Cov}\,g}`.
    """

    mean: float
    std: float

    @property
    def signal_to_noise(self) -> float:
        """Mean over standard deviation; NaN where both are 0."""
        if self.std == 0:
            return float("inf") if self.mean else float("nan")
        return self.mean / self.std


@dataclass(frozen=True)
class GradientDiagnostics:
    """A table with one row for each estimator, as :func:`gradient_diagnostics` returns it.

    :ivar model: from the estimator's name to the summary of the model's parameters.
    :ivar guide: likewise of the guide's. A parameter of both programs counts in both.
    :ivar seconds: from the name to the median time of a step's loss and gradients.
    :ivar num_repeats: the number of draws of the gradient.
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
        """Draws the signal-to-noise ratios as bars, for model and guide.

        :param ax: matplotlib axes; new ones by default.
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
