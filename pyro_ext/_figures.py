from typing import Any


def axes_or_new(ax: Any) -> Any:
    """Return the given matplotlib axes, or new axes if ``ax`` is None."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
