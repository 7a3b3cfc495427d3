"""Proposals made from a model or from a guide."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing import Particles, Program, Programs
from pyro_ext.tracing.enumeration import is_marked
from pyro_ext.tracing.sites import SiteError, base_of, is_delta


@dataclass(frozen=True)
class PriorProposal:
    """The prior of a model as a guide, without observed sites and sites that are summed out."""

    model: Program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw from the prior."""
        with poutine.block(hide_fn=_is_hidden), _ProperSites():
            return self.model(*args, **kwargs)


class _ProperSites(Messenger):
    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and isinstance(base_of(msg["fn"]), dist.ImproperUniform):
            raise SiteError(
                f"The prior of site '{msg['name']}' is improper, so it cannot be drawn from. Pass "
                "a guide."
            )


def _is_hidden(msg: Message) -> bool:
    return msg["type"] == "sample" and (msg["is_observed"] or is_marked(msg))


def raise_for_dependent_prior(owner: str, programs: Programs, particles: Particles) -> None:
    """Raise a SiteError if a prior draws a site given a site that is summed out.

    The density of such draws would need the sum, too.

    :param owner: the name of the calling function.
    :param programs: the model and guide.
    :param particles: their particles.
    """
    if not isinstance(poutine.unwrap(programs.guide), PriorProposal):
        return
    drawn = particles.guide_traces[0].nodes
    for site in particles.density_sites[0]:
        names = [member.name for member in site.members if member.name in drawn]
        if names:
            raise SiteError(
                f"{owner}: the prior of site '{names[0]}' depends on site '{site.name}', which is "
                "summed out, so the prior cannot be the guide. Pass a guide."
            )


class WidenedScales(Messenger):
    """A handler that multiplies the scales of a guide's location-scale sites by a factor.

    :param factor: the factor > 0.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg["fn"]):
            return
        widened = _widen(msg["fn"], self.factor)
        if widened is None:
            raise SiteError(
                f"estimate_evidence: proposal_scale={self.factor} cannot widen guide site "
                f"'{msg['name']}', because {type(base_of(msg['fn'])).__name__} is not a "
                "location-scale family. Widen the guide itself, or use proposal_scale=1."
            )
        msg["fn"] = widened


def _widen(fn: Any, factor: float) -> Any:
    """Return a distribution with its scale multiplied by a factor, or None if it has no scale."""
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
