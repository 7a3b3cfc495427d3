"""Reparameterised draws of a guide, and the leaf tensors that replace them."""

from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext.tracing.moving_supports import support_moves
from pyro_ext.tracing.sites import SiteError, has_particles, is_delta


class Draw(NamedTuple):
    """A reparameterised draw of the guide, and the leaf that replaces it in the rest of the run."""

    name: str
    value: Tensor
    leaf: Tensor
    fn: Any
    scale: Any
    mask: Any
    is_global: bool


class LeafDraws(Messenger):
    """A handler that replaces each reparameterised draw of the guide by a leaf tensor.

    The leaf has the value of the draw, without its graph. Later sites and the model use the leaf,
    so one run yields the derivatives at the draws. The handler also keeps the draws themselves.
    Their graph leads to the guide's parameters. A Delta site is not replaced, because it is a
    function of earlier draws.

    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
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
            return  # the replayed model repeats the sites of the guide
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
