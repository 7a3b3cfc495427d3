"""Reparameterised draws of a guide, and the leaf tensors that replace them."""

from enum import Enum
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext.tracing.moving_supports import support_moves
from pyro_ext.tracing.sites import SiteError, has_particles, is_delta, is_untraced


class Draw(NamedTuple):
    """A reparameterised draw of the guide, and the leaf that replaces it in the rest of the run."""

    name: str
    value: Tensor
    leaf: Tensor
    fn: Any
    scale: Any
    mask: Any
    is_global: bool
    is_point: bool


class Leaves(Enum):
    """The places where leaf tensors replace the reparameterised draws of the guide."""

    NOWHERE = 0
    IN_MODEL = 1
    EVERYWHERE = 2
    EVERYWHERE_WITH_POINTS = 3


class LeafDraws(Messenger):
    """A handler that replaces each reparameterised draw of the guide by a leaf tensor.

    The leaf has the value of the draw, without its graph. Everywhere, the later sites of the guide
    and the model use the leaf, so one run yields the derivatives at the draws. A Delta site (a
    point) is a function of earlier draws, so it is not replaced unless points are asked for. Only
    in the model, the guide keeps its draws, and needs neither their density at a given value nor a
    fixed support. The handler also keeps the draws themselves. Their graph leads to the guide's
    parameters.

    :param leaves: the places of the leaves.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    """

    def __init__(self, leaves: Leaves, local_plate: str | None) -> None:
        super().__init__()
        self.leaves = leaves
        self.local_plate = local_plate
        self.draws: list[Draw] = []
        self._seen: dict[str, Tensor | None] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        name: Any = msg["name"]
        if is_untraced(msg):
            return
        if name in self._seen:  # the replayed model repeats the sites of the guide
            if (leaf := self._seen[name]) is not None:
                msg["value"] = leaf
            return
        self._seen[name] = None
        value: Any = msg["value"]
        fn = msg["fn"]
        if msg["is_observed"] or not self._is_replaced(fn, value):
            return
        leaf = value.detach().requires_grad_()
        is_global = not has_particles(msg, self.local_plate)
        is_point = is_delta(fn)
        draw = Draw(name, value, leaf, fn, msg["scale"], msg["mask"], is_global, is_point)
        self.draws.append(draw)
        if self.leaves is Leaves.IN_MODEL:
            self._seen[name] = leaf
        else:
            if not is_point and support_moves(fn):
                raise SiteError(_moving_support(name))
            msg["value"] = leaf

    def _is_replaced(self, fn: Any, value: Any) -> bool:
        if self.leaves is Leaves.IN_MODEL or (
            self.leaves is Leaves.EVERYWHERE_WITH_POINTS and is_delta(fn)
        ):
            return value.requires_grad
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
