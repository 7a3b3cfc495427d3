from typing import Any


def axes_or_new(ax: Any) -> Any:
    """The given matplotlib axes, or new ones if None."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
