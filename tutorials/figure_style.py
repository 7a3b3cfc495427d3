"""The style that the figures of all tutorials share."""

import math
from pathlib import Path

import matplotlib.pyplot as plt


def use_style() -> None:
    """Draw the figures from now on in the style of ``pyro_ext.mplstyle``."""
    plt.style.use(Path(__file__).with_name("pyro_ext.mplstyle"))


def label_lines(axis: plt.Axes) -> None:
    """Write the label of each line at its right end, at least 13 points apart."""
    axis.figure.draw_without_rendering()
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    height = math.inf
    for line in sorted(lines, key=lambda line: -line.get_ydata()[-1]):
        end = axis.transData.transform(line.get_xydata()[-1])[1] * 72 / axis.figure.dpi
        height = min(end, height - 13)
        axis.annotate(
            *(line.get_label(), line.get_xydata()[-1], (7, height - end)),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
        )
