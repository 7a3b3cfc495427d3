import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer


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

    def plot(self, axes: Any = None) -> Any:
        """Draws the signal-to-noise ratios as bars, for model and guide.

        :param axes: matplotlib axes; new ones by default.
        :returns: the axes.
        """
        if axes is None:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots(layout="constrained")
        names = list(self.seconds)
        for offset, label, group in ((-0.2, "model", self.model), (0.2, "guide", self.guide)):
            ratios = [group[name].signal_to_noise for name in names]
            axes.barh([i + offset for i in range(len(names))], ratios, height=0.4, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="signal-to-noise ratio of the gradient", xscale="log")
        axes.legend()
        return axes


def gradient_diagnostics(
    model: Callable,
    guide: Callable,
    *args: Any,
    elbos: Mapping[str, ELBO],
    num_repeats: int = 100,
    progress_bar: bool = False,
    **kwargs: Any,
) -> GradientDiagnostics:
    r"""Compares the gradients of estimators, for a model and guide at their present parameters.

    The signal-to-noise ratio of a gradient g,

    .. math:: \lVert \mathrm E g \rVert / \sqrt{\mathrm{tr}\,\mathrm{Cov}\,g},

    is apart for model and guide, because a tighter bound can help the one and harm the other.
    Gradients that parameters hold are left as they are, and no parameter changes.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational Bounds
    are Not Necessarily Better.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, likewise.
    :param args: positional arguments of both.
    :param elbos: from a name to an estimator, of this package or of Pyro.
    :param int num_repeats: the number of draws R >= 2 of each gradient.
    :param bool progress_bar: whether to show one.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: a :class:`GradientDiagnostics`.
    :raises ValueError: if there are no estimators, fewer than two repeats, or no parameters.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import ImportanceWeightedELBO
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("b", torch.tensor(0.4)), 0.8))
    >>> elbos = {
    ...     rule: ImportanceWeightedELBO(20, gradient=rule, max_plate_nesting=0)
    ...     for rule in ("pathwise", "dreg")
    ... }
    >>> found = gradient_diagnostics(model, guide, elbos=elbos)
    >>> found.guide["dreg"].std < found.guide["pathwise"].std
    True
    """
    check_integer("gradient_diagnostics", "num_repeats", num_repeats, 2)
    if not elbos:
        raise ValueError(
            "gradient_diagnostics: expected at least one estimator in elbos, got none."
        )
    groups = _parameters(model, guide, args, kwargs)
    summaries: dict[str, dict[str, GradientSummary]] = {program: {} for program in groups}
    seconds = {}
    total = num_repeats * len(elbos)
    with tqdm(total=total, desc="gradients", disable=not progress_bar) as bar:
        for name, elbo in elbos.items():
            draws: dict[str, list[Tensor]] = {program: [] for program in groups}
            times = []
            for _ in range(num_repeats):
                elapsed, found = _draw(elbo, model, guide, args, kwargs, groups)
                times.append(elapsed)
                for program, gradient in found.items():
                    draws[program].append(gradient)
                bar.update()
            seconds[name] = sorted(times)[num_repeats // 2]
            for program, gradients in draws.items():
                summaries[program][name] = _summary(torch.stack(gradients))
    return GradientDiagnostics(summaries["model"], summaries["guide"], seconds, num_repeats)


def _parameters(
    model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[Tensor]]:
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    groups: dict[str, list[Tensor]] = {}
    for program, trace in (("model", model_trace), ("guide", guide_trace)):
        values: list[Any] = [trace.nodes[name]["value"] for name in trace.param_nodes]
        # Parameters of modules may come as they are.
        groups[program] = [getattr(value, "unconstrained", lambda v=value: v)() for value in values]
    if not any(groups.values()):
        raise ValueError("gradient_diagnostics: expected pyro.param or pyro.module, got none.")
    return groups


def _draw(
    elbo: Any,
    model: Callable,
    guide: Callable,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    groups: dict[str, list[Tensor]],
) -> tuple[float, dict[str, Tensor]]:
    """The seconds of a step and the gradient of each group, as one vector."""
    parameters = {id(p): p for group in groups.values() for p in group}
    kept = {key: p.grad for key, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        start = time.perf_counter()
        elbo.loss_and_grads(model, guide, *args, **kwargs)
        if any(p.is_cuda for p in parameters.values()):
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        found = {
            program: torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group]
                or [torch.zeros(0)]
            )
            for program, group in groups.items()
        }
    finally:
        for key, p in parameters.items():
            p.grad = kept[key]
    return elapsed, found


def _summary(gradients: Tensor) -> GradientSummary:
    num_repeats = len(gradients)
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (num_repeats - 1)
    squared_mean = mean.square().sum() - variance / num_repeats
    return GradientSummary(squared_mean.clamp(min=0).sqrt().item(), variance.sqrt().item())
