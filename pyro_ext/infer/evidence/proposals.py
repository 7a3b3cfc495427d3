"""Guides made from a model or from another guide, to propose draws from."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing.sites import SiteError, is_delta


class PriorProposal:
    """The prior of a model as a guide: its latent sites, without what is observed."""

    def __init__(self, model: Callable) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Draws the latent sites."""
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"]):
            self.model(*args, **kwargs)


class WidenedProposal:
    """A guide whose location-scale sites have their scales multiplied by a factor.

    :param guide: the guide.
    :param float factor: the factor, positive.
    """

    def __init__(self, guide: Callable, factor: float) -> None:
        self.guide = guide
        self.factor = factor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the guide."""
        with _Widen(self.factor):
            return self.guide(*args, **kwargs)


class _Widen(Messenger):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg["fn"]):
            return
        widened = _widen(msg["fn"], self.factor)
        if widened is None:
            raise SiteError(
                f"proposal_scale={self.factor}: expected guide site '{msg['name']}' to be of a "
                f"location-scale family, got {msg['fn']}, whose scale cannot be multiplied. Widen "
                "the guide itself, or use proposal_scale=1."
            )
        msg["fn"] = widened


def _widen(fn: Any, factor: float) -> Any:
    """The distribution with its scale multiplied, or None if it has none."""
    if isinstance(fn, dist.MaskedDistribution):
        widened = _widen(fn.base_dist, factor)
        return widened and widened.mask(mask_of(fn))
    if isinstance(fn, dist.Independent):
        widened = _widen(fn.base_dist, factor)
        return widened and widened.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc, scale_tril=factor * fn.scale_tril)
    if isinstance(fn, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(
            fn.loc, factor * fn.cov_factor, factor**2 * fn.cov_diag
        )
    if {"loc", "scale"} <= fn.arg_constraints.keys():
        parameters = {name: getattr(fn, name) for name in fn.arg_constraints}
        return type(fn)(**(parameters | {"scale": factor * fn.scale}))
    if isinstance(fn, dist.TransformedDistribution):
        base = _widen(fn.base_dist, factor)
        return base and dist.TransformedDistribution(base, fn.transforms)
    return None
