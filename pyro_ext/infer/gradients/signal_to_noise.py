import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer
from pyro_ext.infer.gradients.gradient_diagnostics import GradientDiagnostics, GradientSummary
from pyro_ext.tracing import Program, Programs
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs


def gradient_diagnostics(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    elbos: Mapping[str, ELBO],
    num_repeats: int = 100,
    progress_bar: bool = False,
    **kwargs: Any,
) -> GradientDiagnostics:
    r"""Compare the gradients of several estimators at the current parameters of model and guide.

    .. math:: \lVert \mathrm E g \rVert / \sqrt{\mathrm{tr}\,\mathrm{Cov}\,g}

    This is the signal-to-noise ratio of a gradient g. It is computed separately for model and
    guide, because a tighter bound can raise the ratio of the model and lower the ratio of the
    guide. The parameters and their ``.grad`` do not change.

    :param model: a trained SVI, or the model: a callable with Pyro primitives.
    :param guide: the guide. Leave it out after an SVI.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param elbos: a dict from a name of your choice to an estimator of this package or of Pyro.
    :param num_repeats: the number of draws R >= 2 of each gradient.
    :param progress_bar: whether to show a progress bar.
    :param kwargs: further keyword arguments of model and guide.
    :returns: a :class:`GradientDiagnostics`.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if there are no estimators, fewer than two repeats or no parameters, or if
        the SVI has not been trained.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational Bounds
    are Not Necessarily Better.

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
    name = "gradient_diagnostics"
    programs = read_programs(name, model, guide, args, kwargs, model_args, model_kwargs)
    check_integer(name, "num_repeats", num_repeats, 2)
    if not elbos:
        raise ValueError("gradient_diagnostics: elbos is empty. Pass at least one estimator.")
    groups = _parameters(programs)
    summaries: dict[str, dict[str, GradientSummary]] = {program: {} for program in groups}
    seconds = {}
    total = num_repeats * len(elbos)
    with tqdm(total=total, desc="gradients", disable=not progress_bar) as bar:
        for name, elbo in elbos.items():
            draws: dict[str, list[Tensor]] = {program: [] for program in groups}
            times = []
            for _ in range(num_repeats):
                elapsed, found = _draw(elbo, programs, groups)
                times.append(elapsed)
                for program, gradient in found.items():
                    draws[program].append(gradient)
                bar.update()
            seconds[name] = sorted(times)[num_repeats // 2]
            for program, gradients in draws.items():
                summaries[program][name] = _summary(torch.stack(gradients))
    return GradientDiagnostics(summaries["model"], summaries["guide"], seconds, num_repeats)


def _parameters(programs: Programs) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {}
    for program, trace in programs.run().items():
        values: list[Any] = [trace.nodes[name]["value"] for name in trace.param_nodes]
        # Parameters of modules may have no unconstrained value.
        groups[program] = [getattr(value, "unconstrained", lambda v=value: v)() for value in values]
    if not any(groups.values()):
        raise ValueError(
            "gradient_diagnostics: model and guide have no parameters. Add them with pyro.param or "
            "pyro.module."
        )
    return groups


def _draw(
    elbo: Any, programs: Programs, groups: dict[str, list[Tensor]]
) -> tuple[float, dict[str, Tensor]]:
    """Return the seconds of one step, and the gradient of each group as one vector."""
    parameters = {id(p): p for group in groups.values() for p in group}
    kept = {key: p.grad for key, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        start = time.perf_counter()
        elbo.loss_and_grads(programs.model, programs.guide, *programs.args, **programs.kwargs)
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


def _summary(gradients: Float[Tensor, "R D"]) -> GradientSummary:
    num_repeats = len(gradients)
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (num_repeats - 1)
    squared_mean = mean.square().sum() - variance / num_repeats
    return GradientSummary(squared_mean.clamp(min=0).sqrt().item(), variance.sqrt().item())
