"""Reparameterised draws of a guide, and the leaf tensors that replace them."""

from collections.abc import Collection
from enum import Enum
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext.tracing.moving_supports import support_moves
from pyro_ext.tracing.sites import SiteError, has_particles, is_delta, is_untraced


class Gate:
    """The identity, with a factor on the gradient that passes through it.

    :ivar factor: the factor, which broadcasts against the gradient; None if nothing passes.
    :ivar is_taken: whether an objective relies on the factor.
    """

    def __init__(self, factor: Tensor | float | None) -> None:
        self.factor = factor
        self.is_taken = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the same values behind the gate."""
        return _Gated.apply(x, self)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        factor = ctx.gate.factor
        if factor is None:
            return None, None
        return (gradient * factor if isinstance(factor, Tensor) else gradient), None


def _is_gated(x: Tensor) -> bool:
    """Return whether a tensor is a leaf already, like that of a global draw of another particle."""
    return isinstance(getattr(x.grad_fn, "gate", None), Gate)


class Draw(NamedTuple):
    """A reparameterised draw of the guide, and the leaf that replaces it in the rest of the run.

    A point has no leaf unless one is asked for. Its ``leaf`` then is the value itself.

    :ivar gate: the gate between the draw and its leaf. It is closed, unless a rule opens it.
    :ivar model_gate: the gate between the leaf and the model. It is open, and a rule may set its
        factor. None if the guide runs the model itself.
    :ivar particle: the index of the particle; None if the value holds all particles.
    """

    name: str
    value: Tensor
    leaf: Tensor
    fn: Any
    scale: Any
    mask: Any
    is_global: bool
    is_point: bool
    gate: Gate
    model_gate: Gate | None
    particle: int | None

    @property
    def is_replaced(self) -> bool:
        """Whether a leaf replaces the draw."""
        return self.leaf is not self.value


def last_gates(x: Tensor, gates: Collection[Gate | None]) -> set[Gate | None]:
    """Return the gates that a gradient of a tensor reaches first, among some gates.

    :param x: a tensor with an autograd graph.
    :param gates: gates, at which the search ends.
    :returns: the gates; None among them stands for a parameter that no gate separates from ``x``.
    """
    found: set[Gate | None] = set()
    seen: set[Any] = {None}
    nodes: list[Any] = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        gate = getattr(node, "gate", None)
        if gate is not None and gate in gates:
            found.add(gate)
        elif node.next_functions:
            nodes += [parent for parent, _ in node.next_functions]
        else:  # the end of a graph accumulates the gradient of a parameter
            found.add(None)
    return found


class Leaves(Enum):
    """The places where leaf tensors replace the reparameterised draws of the guide."""

    NOWHERE = 0
    IN_MODEL = 1
    EVERYWHERE = 2
    EVERYWHERE_WITH_POINTS = 3


class LeafDraws(Messenger):
    """A handler that replaces each reparameterised draw of the guide by a leaf tensor.

    The leaf has the value of the draw, behind a gate. At first, the gate is closed, so that the
    leaf is the end of the graph. Everywhere, the later sites of the guide and the model use the
    leaf, so one run yields the derivatives at the draws. A Delta site (a point) is a function of
    earlier draws, so it is not replaced unless points are asked for. Only in the model, the guide
    keeps its draws, and needs neither their density at a given value nor a fixed support. The
    handler also keeps the draws themselves. Their graph leads to the guide's parameters.

    :param leaves: the places of the leaves.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    :param guide_runs_model: whether the guide runs the model itself.
    :param particle: the index of the particle; None if all particles run at once.
    """

    def __init__(
        self,
        leaves: Leaves,
        local_plate: str | None,
        guide_runs_model: bool = False,
        particle: int | None = None,
    ) -> None:
        super().__init__()
        self.leaves = leaves
        self.local_plate = local_plate
        self.guide_runs_model = guide_runs_model
        self.particle = particle
        self._seen: dict[str, Draw | None] = {}

    @property
    def draws(self) -> list[Draw]:
        """The draws so far, in the order of sampling."""
        return [draw for draw in self._seen.values() if draw is not None]

    def _pyro_post_sample(self, msg: Message) -> None:
        name: Any = msg["name"]
        if is_untraced(msg):
            return
        if name in self._seen:  # the replayed model repeats the sites of the guide
            draw = self._seen[name]
            if draw is not None:
                gate = draw.model_gate
                msg["value"] = draw.leaf if gate is None else gate(draw.leaf)
            return
        self._seen[name] = None
        value: Any = msg["value"]
        fn = msg["fn"]
        if msg["is_observed"] or not value.requires_grad or _is_gated(value):
            return
        is_point = is_delta(fn)
        is_replaced = self._is_replaced(fn, value)
        if not (is_replaced or is_point):
            return
        gate = Gate(factor=None)
        draw = self._seen[name] = Draw(
            name=name,
            value=value,
            leaf=gate(value) if is_replaced else value,
            fn=fn,
            scale=msg["scale"],
            mask=msg["mask"],
            is_global=not has_particles(msg, self.local_plate),
            is_point=is_point,
            gate=gate,
            model_gate=None if self.guide_runs_model else Gate(factor=1.0),
            particle=self.particle,
        )
        if is_replaced and self.leaves is not Leaves.IN_MODEL:
            if not is_point and support_moves(fn):
                raise SiteError(_moving_support(name))
            msg["value"] = draw.leaf

    def _is_replaced(self, fn: Any, value: Any) -> bool:
        if self.leaves is Leaves.IN_MODEL or (
            self.leaves is Leaves.EVERYWHERE_WITH_POINTS and is_delta(fn)
        ):
            return True
        return getattr(fn, "has_rsample", False) and value.grad_fn is not None and not is_delta(fn)

    def raise_without_inverse(self, error: Exception) -> None:
        """Raise a ValueError if a leaf has no density because a transform lacks an inverse."""
        for draw in self.draws:
            try:
                with torch.no_grad():
                    draw.fn.log_prob(draw.leaf.detach())
            except Exception:
                raise ValueError(
                    f"Guide site '{draw.name}' has no density at a given value, because a "
                    "transform of its distribution has no inverse. Use transforms with an "
                    "inverse, or gradient='pathwise'."
                ) from error


def _moving_support(name: str) -> str:
    return (
        f"Guide site '{name}' has a support with a bound that depends on a parameter or an earlier "
        "draw. gradient='dreg' and gradient='stl' may be biased for this site. Use "
        "gradient='pathwise'."
    )
