from typing import Any

from pyro_ext._figures import axes_or_new


def plot_model_comparison(comparison: Any, ax: Any = None) -> Any:
    """Plot the log evidences of models, with the look of ``arviz.plot_compare``.

    The best model is at the top. Bars have a length of one standard error on each side. A dashed
    line marks the best log evidence. The labels hold the probabilities of the models. Red points
    mark flagged estimates. This needs matplotlib.

    :param comparison: the result of :func:`compare_models`.
    :param ax: the matplotlib axes; None for new axes.
    :returns: the axes.

    >>> import matplotlib, torch, pyro, pyro.distributions as dist
    >>> matplotlib.use("agg")
    >>> from pyro_ext.diagnostics import compare_models
    >>> def model(scale):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, scale))
    ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.5))
    >>> found = compare_models({"narrow": lambda: model(1.0), "wide": lambda: model(9.0)})
    >>> [label.get_text().split()[0] for label in plot_model_comparison(found).get_yticklabels()]
    ['narrow', 'wide']
    """
    ax = axes_or_new(ax)
    for position, (_, row) in enumerate(comparison.iterrows()):
        color = "tab:red" if row["flags"] else "black"
        x, error = row["log_evidence"], row["std_error"]
        ax.errorbar(x, position, xerr=error, fmt="o", color=color, mfc="white")
    ax.axvline(comparison["log_evidence"].iloc[0], linestyle="--", color="grey")
    probabilities = comparison["probability"]
    labels = [f"{name} ({probability:.2g})" for name, probability in probabilities.items()]
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set(
        xlabel="log evidence, nats",
        ylabel="ranked models (probability)",
        title="Model comparison\nhigher is better",
    )
    return ax
