from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_ext._deprecated import renamed_arguments


@dataclass(frozen=True)
class Calibration:
    """The positions of true values among the draws of guides that were fitted to simulated data.

    :ivar probabilities: for each latent site, the fraction of draws below the true value, of shape
        ``(R, *shape)`` for R simulations. The fractions are uniform if the guides are right.
    :ivar symmetry_p_values: for each latent site, the p-values of a Wilcoxon signed-rank test that
        the fractions are symmetric about 1/2. They are small if the guide is biased.
    :ivar uniformity_p_values: for each latent site, the p-values of a Kolmogorov-Smirnov test that
        the distances of the fractions from 1/2 are uniform. They are small if the guide is too
        narrow or too wide.
    """

    probabilities: dict[str, np.ndarray]
    symmetry_p_values: dict[str, np.ndarray]
    uniformity_p_values: dict[str, np.ndarray]

    def __repr__(self) -> str:
        R = len(next(iter(self.probabilities.values())))
        lines = [f"Calibration({R} simulations)"]
        for name, fractions in self.probabilities.items():
            bias = self._verdict(self.symmetry_p_values[name], "biased", "unbiased")
            outside = np.abs(fractions - 0.5).mean()
            direction = "too narrow" if outside > 0.25 else "too wide"
            spread = self._verdict(self.uniformity_p_values[name], direction, "of the right width")
            lines.append(f"  {name:12} the guide is {bias} and {spread}")
        return "\n".join(lines)

    @staticmethod
    def _verdict(p_values: np.ndarray, bad: str, good: str) -> str:
        # Bonferroni correction of the smallest of n p-values.
        smallest = min(1.0, float(p_values.min()) * p_values.size)
        return f"{bad if smallest < 0.01 else good} (p {smallest:.2g})"

    @renamed_arguments(axes="ax")
    def plot(self, ax: Any = None) -> Any:
        """Draw a histogram of the fractions for each site, with the 99 % band of uniform fractions.

        This needs matplotlib.

        :param ax: an array of matplotlib axes, one for each site. With None, new axes are created.
        :returns: the array of axes.
        """
        import matplotlib.pyplot as plt
        from scipy import stats

        if ax is None:
            size = len(self.probabilities)
            ax = plt.subplots(1, size, squeeze=False, layout="constrained")[1][0]
        for axis, (name, fractions) in zip(np.ravel(ax), self.probabilities.items(), strict=True):
            values = fractions.reshape(-1)
            num_bins = min(20, max(5, len(values) // 20))
            axis.hist(values, bins=num_bins, range=(0, 1))
            low, high = stats.binom.interval(0.99, len(values), 1 / num_bins)
            axis.axhspan(low, high, color="black", alpha=0.15)
            axis.set(title=name, xlabel="fraction of draws below the truth")
        return ax


def tested(fractions: dict[str, np.ndarray]) -> Calibration:
    """Return the calibration for given fractions of each site, with the p-values of the tests."""
    from scipy import stats

    symmetry, uniformity = {}, {}
    for name, values in fractions.items():
        columns = values.reshape(len(values), -1).T
        symmetry[name] = np.array([stats.wilcoxon(c - 0.5).pvalue for c in columns])
        uniformity[name] = np.array(
            [stats.kstest(np.abs(2 * c - 1), "uniform").pvalue for c in columns]
        )
    return Calibration(fractions, symmetry, uniformity)
