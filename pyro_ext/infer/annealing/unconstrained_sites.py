from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TransformedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_ext._arguments import check_type
from pyro_ext.tracing.sites import PARTICLE_PLATE, SiteError, base_of, is_delta, is_masked_out

CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class UnconstrainedSites(Messenger):
    """A handler that sets or records the unconstrained values of a guide's latent sites.

    :param owner: the name of the algorithm, for error messages.
    :param given: a dict from site name to the unconstrained value to set. With None, the values of
        the draws are recorded.
    :param sample: a dict from site name to a value to use instead of draws, the same for all
        particles.

    :ivar positions: a dict from site name to the recorded unconstrained values.
    :ivar rounded: a dict from site name to the share of draws whose density changes where a value
        is replaced by that of its position.
    :ivar log_dets: a dict from site name to the log determinant of the Jacobian at the given
        values.
    """

    def __init__(
        self,
        owner: str,
        given: dict[str, Tensor] | None = None,
        sample: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.given = given
        self.sample = sample
        self.positions: dict[str, Tensor] = {}
        self.rounded: dict[str, float] = {}
        self.log_dets: dict[str, Tensor] = {}
        self.particle_dim = 0
        self._of_guide: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        # A site with a value is a guide site that is replayed in the model.
        if msg["value"] is not None or not is_latent(msg):
            return
        name: Any = msg["name"]
        if is_masked_out(msg):
            raise SiteError(
                f"{self.owner}: site '{name}' is masked out and has no density. Remove it from the "
                "model and the guide."
            )
        self._of_guide.add(name)
        if self.given is not None:
            transform = to_support(self.owner, msg)
            msg["value"] = transform(self.given[name])
            msg["done"] = True
            self.log_dets[name] = transform.log_abs_det_jacobian(self.given[name], msg["value"])
        elif self.sample is not None and name in self.sample:
            msg["value"] = _fitted(self.owner, msg, self.sample[name])
            msg["done"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        name: Any = msg["name"]
        if self.given is not None or name in self.positions or name not in self._of_guide:
            return
        value: Any = msg["value"]
        transform = to_support(self.owner, msg)
        self.positions[name] = transform.inv(value)
        self.rounded[name] = _rounded(msg["fn"], value, transform(self.positions[name]))
        frames = {frame.name: frame.dim or 0 for frame in msg["cond_indep_stack"]}
        self.particle_dim = frames[PARTICLE_PLATE]


def check_sample(owner: str, sample: Any) -> None:
    """Raise a TypeError unless an exact sample is a dict from names to floating-point tensors."""
    expected = "a dict from the name of each latent site to its value"
    check_type(owner, "exact_sample", sample, Mapping, expected)
    for name, value in sample.items():
        check_type(owner, f"exact_sample['{name}']", value, Tensor, "a tensor")
        if not value.is_floating_point():
            raise TypeError(
                f"{owner}: exact_sample['{name}'] must have a floating-point dtype, but it has "
                f"{value.dtype}."
            )


def _fitted(owner: str, msg: Any, value: Tensor) -> Tensor:
    """Return a value of a site for all particles, in the dtype of the site.

    :raises SiteError: if it is on another device, has another shape or is outside of the support.
    """
    fn, name = msg["fn"], msg["name"]
    with torch.no_grad():
        like = fn()
    what = f"{owner}: exact_sample['{name}']"
    if value.device != like.device:
        raise SiteError(f"{what} is on {value.device}, but the site is on {like.device}. Move it.")
    shape = like.shape[1:]  # without the particles
    natural = shape[next((i for i, n in enumerate(shape) if n != 1), len(shape)) :]
    padded = (1,) * (len(shape) - value.dim()) + value.shape
    if padded != shape:
        raise SiteError(
            f"{what} has shape {tuple(value.shape)}, but the site has shape {tuple(natural)}. Pass "
            "one value for each element of its plates and of its event."
        )
    value = value.to(like.dtype).expand(like.shape)
    is_outside = ~(fn.support.check(value) & value.isfinite().all())
    if is_outside.any():
        raise SiteError(
            f"{what} lies outside of the support of this site of the guide. Pass a draw from the "
            "posterior, or a guide with the support of the posterior."
        )
    return value


def _rounded(fn: Any, value: Tensor, of_position: Tensor) -> float:
    """Return the share of draws whose log-probability changes by more than 0.1 nats."""
    if isinstance(base_of(fn), TransformedDistribution):
        return 0.0  # a flow may have no inverse at another value
    with torch.no_grad():
        is_inside = fn.support.check(of_position)
        mask = is_inside.reshape(is_inside.shape + (1,) * fn.event_dim)
        change = fn.log_prob(of_position.where(mask, value)) - fn.log_prob(value)
    return 1 - (is_inside & (change.abs() < 0.1)).double().mean().item()


def to_support(owner: str, msg: Any) -> Any:
    """Return the transform from unconstrained values to the support of a site.

    :param owner: the name of the algorithm, for the error.
    :param msg: the site.
    :raises SiteError: if the site has no such transform.
    """
    support = msg["fn"].support
    try:
        # Circular distributions declare the real line as support, where they are improper.
        if support.is_discrete or isinstance(base_of(msg["fn"]), CIRCULAR):
            raise NotImplementedError
        return biject_to(support)
    except NotImplementedError:
        raise SiteError(
            f"{owner}: site '{msg['name']}' ({type(base_of(msg['fn'])).__name__}) is "
            "discrete, or has no map to unconstrained space. Mark a discrete site of the model "
            "with infer={'enumerate': 'parallel'}, without the guide, or use estimate_evidence."
        ) from None


def is_latent(msg: Any) -> bool:
    """Return whether a site of a guide is a draw."""
    return not (msg["is_observed"] or site_is_subsample(msg) or is_delta(msg["fn"]))
