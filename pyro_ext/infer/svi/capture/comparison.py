"""Compares the results of a graph with those of the programs, on the same noise and state."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ext._random_states import kept_random_states


@dataclass(frozen=True)
class Results:
    """The results of a step, and its traces in the tensors and random states around it.

    :param tensors: the loss, then the gradients of the parameters. None stands for no gradient.
    :param written: the values of the tensors that the step changes in place, such as buffers.
    :param random_state: the state of the random generator after the step.
    """

    tensors: Sequence[Tensor | None]
    written: Sequence[Tensor]
    random_state: Tensor


def rehearse(
    run: Callable[[], Sequence[Tensor | None]],
    num_gradients: int,
    written: Iterable[Tensor],
    seed: int | None = None,
) -> Results:
    """Return the results of a run, and undo its effects.

    :param run: the run, which returns the loss, the gradients, and perhaps unused random numbers.
    :param num_gradients: the number of gradients.
    :param written: the tensors that the run may change in place.
    :param seed: the seed of its random numbers. None uses those that come next.
    """
    written = list(written)
    with kept_random_states(seed), torch.no_grad():
        before = [x.detach().clone() for x in written]
        try:
            outputs = run()[: num_gradients + 1]
            tensors = [x if x is None else x.detach().clone() for x in outputs]
            after = [x.detach().clone() for x in written]
            return Results(tensors, after, torch.get_rng_state())
        finally:
            for x, value in zip(written, before, strict=True):
                x.data.copy_(value)  # .data: a loss without its backward may hold x


def aliases_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the same memory. Autograd does not notice changes through them."""
    return [x.data for x in tensors]


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """Return the rounding error of the least precise dtype of floating-point numbers."""
    return max((torch.finfo(x).eps for x in dtypes if x.is_floating_point), default=0.0)


def difference(
    expected: Results, found: Results, names: Sequence[str], eps: float, is_strict: bool = False
) -> str | None:
    """Return the first difference of results beyond rounding, or None.

    :param expected: the results of the programs.
    :param found: the results of a graph.
    :param names: the names of the parameters whose gradients the results have.
    :param eps: the rounding error of one operation.
    :param is_strict: whether only a few rounding errors are accepted, as they occur without
        cancellation.
    """
    if not torch.equal(expected.random_state, found.random_state):
        return "the two draw different random numbers"
    gradients = [x for x in expected.tensors[1:] if x is not None]
    largest = max((_max_abs(x) for x in gradients), default=0.0)
    labels = ["the loss", *(f"the gradient of '{name}'" for name in names)]
    pairs = list(zip(labels, expected.tensors, found.tensors, strict=False))
    pairs += [
        (f"a buffer of shape {tuple(x.shape)}", x, y)
        for x, y in zip(expected.written, found.written, strict=True)
    ]
    for label, x, y in pairs:
        if x is None or y is None:
            if x is not y:
                return f"{label} exists in only one of the two"
            continue
        if label != "the loss" and x.dtype != y.dtype:
            return f"{label} has dtype {y.dtype}, not {x.dtype}"
        if x.shape != y.shape:
            return f"{label} has shape {tuple(y.shape)}, not {tuple(x.shape)}"
        x, y = (v if v.is_floating_point() or v.is_complex() else v.double() for v in (x, y))
        gap = _norm(x - y)
        if not math.isfinite(gap):
            finite = x.isfinite()
            if not torch.equal(finite, y.isfinite()):
                return f"{label} is finite in only one of the two"
            gap = _max_abs((x - y)[finite])
        size = _max_abs(x)
        relative = 100 * eps if is_strict else math.sqrt(eps)
        tolerance = relative * size + (10 if is_strict else 100) * eps * largest
        if gap > tolerance:
            return f"{label} differs by {gap:.3g} (largest entry: {size:.3g})"
    return None


def _max_abs(x: Tensor) -> float:
    """Return the largest absolute value of the finite entries."""
    largest = _norm(x)
    return largest if math.isfinite(largest) else _norm(x[x.isfinite()])


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, math.inf)) if x.numel() else 0.0
