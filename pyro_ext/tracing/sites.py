"""Predicates of sample sites, and the error that names one."""

from collections.abc import Sequence
from typing import Any

from pyro.distributions import Delta, TransformedDistribution

from pyro_ext._private.of_pyro import mask_of

PARTICLE_PLATE = "num_particles_vectorized"


class SiteError(ValueError):
    """A site of the model does not match the guide, or cannot be handled."""


def lies_in(site: Any, plate: str) -> bool:
    """Whether a site or message is inside the plate of a name."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def has_particles(site: Any, local_plate: str | None) -> bool:
    """Whether a site is drawn once a particle: it lies in the local plate, if there is one."""
    return local_plate is None or lies_in(site, local_plate)


def base_of(fn: Any) -> Any:
    """A distribution without what expands or masks it, or gives it event dims."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return fn


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a Delta, possibly expanded, masked or with event dims."""
    return isinstance(base_of(fn), Delta)


def is_masked_out(site: Any) -> bool:
    """Whether a site adds nothing to the density, as ``pyro.deterministic`` does."""
    return site["mask"] is False or mask_of(site["fn"]) is False


def has_dim(shape: Sequence[int], dim: int) -> bool:
    """Whether a shape has a size other than 1 at a dim that is counted from the right."""
    return len(shape) >= -dim and shape[dim] != 1


def global_site_error(program: str, name: str) -> SiteError:
    """The error for a site that depends on local draws but lies outside of their plate."""
    return SiteError(
        f"Site '{name}' of the {program} depends on the draws inside of local_plate, but it lies "
        "outside of the plate. Sites outside are drawn once, sites inside once for each particle. "
        "Move the site into the plate, or do without local_plate."
    )
