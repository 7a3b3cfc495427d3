"""Reparameterised draws of a guide, and the leaves that take their place."""

from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext.tracing.moving_supports import support_moves
from pyro_ext.tracing.sites import SiteError, has_particles, is_delta


class Draw(NamedTuple):
    """A reparameterised draw, and the leaf that took its place in the rest of the program."""

    name: str
    value: Tensor
    leaf: Tensor
    fn: Any
    scale: Any
    mask: Any
    is_global: bool


class LeafDraws(Messenger):
    """Replaces each reparameterised draw of the guide by a leaf copy, and keeps the pair.

    Later sites and the model see the leaf, so that one run yields both the derivatives at the
    draws and, through the pairs, the paths to the guide's parameters. A Delta is no draw but a
    function of earlier ones: it stays as it is.

    :param str local_plate: the name of the plate that holds the particles; None if they are
        around every site.
    """

    def __init__(self, local_plate: str | None) -> None:
        super().__init__()
        self.local_plate = local_plate
        self.draws: list[Draw] = []
        self._seen: set[str] = set()

    def _pyro_post_sample(self, msg: Message) -> None:
        name: Any = msg["name"]
        value: Any = msg["value"]
        fn = msg["fn"]
        if name in self._seen:
            return  # the model, replayed
        self._seen.add(name)
        if (
            not msg["is_observed"]
            and getattr(fn, "has_rsample", False)
            and value.grad_fn is not None
            and not is_delta(fn)
        ):
            if support_moves(fn):
                raise SiteError(_moving_support(name))
            leaf = msg["value"] = value.detach().requires_grad_()
            is_global = not has_particles(msg, self.local_plate)
            self.draws.append(Draw(name, value, leaf, fn, msg["scale"], msg["mask"], is_global))

    def raise_without_inverse(self, error: Exception) -> None:
        """Raises if a leaf has no density because its distribution's transform has no inverse."""
        for draw in self.draws:
            try:
                with torch.no_grad():
                    draw.fn.log_prob(draw.leaf.detach())
            except Exception:
                raise ValueError(
                    f"Guide site '{draw.name}' has no density at a given value: expected a "
                    f"distribution whose transforms have an inverse, got {draw.fn}. Use "
                    "gradient='pathwise'."
                ) from error


def _moving_support(name: str) -> str:
    return (
        f"Guide site '{name}' has a support with a bound that depends on a parameter or an earlier "
        "draw: expected fixed bounds for gradient='dreg' and 'stl', which may be biased where a "
        "density ends at a moving one; use gradient='pathwise'."
    )
