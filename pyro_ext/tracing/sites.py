"""Predicates of sample sites, and an error that names a site."""

from collections.abc import Sequence
from typing import Any

from pyro.distributions import Delta, TransformedDistribution

from pyro_ext._private.of_pyro import mask_of

PARTICLE_PLATE = "num_particles_vectorized"


class SiteError(ValueError):
    """An error about a site that does not match between model and guide, or is not supported."""


class EnumeratedGuideError(SiteError):
    """An error about a site of a guide that is marked for enumeration."""


class ParticleDimError(SiteError):
    """An error about programs that run with one particle, but not with several at once."""


def lies_in(site: Any, plate: str) -> bool:
    """Return whether a site or message is inside the plate with a given name."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def has_particles(site: Any, local_plate: str | None) -> bool:
    """Return whether a site is drawn once for each particle.

    With a local plate, only the sites inside it are drawn once for each particle.
    """
    return local_plate is None or lies_in(site, local_plate)


def base_of(fn: Any) -> Any:
    """Return a distribution without its outer expansion, mask and event dims."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return fn


def is_delta(fn: Any) -> bool:
    """Return whether a distribution is a Delta, possibly expanded, masked or with event dims."""
    return isinstance(base_of(fn), Delta)


def is_masked_out(site: Any) -> bool:
    """Return whether a site adds nothing to the density, like ``pyro.deterministic``."""
    return site["mask"] is False or mask_of(site["fn"]) is False


def is_untraced(site: Any) -> bool:
    """Return whether Pyro leaves a site out of its traces, as ConjugateReparam asks for."""
    return bool((site["infer"] or {}).get("_do_not_trace"))


def is_deterministic(site: Any) -> bool:
    """Return whether a site is a function of other sites, and neither latent nor data.

    Such sites come from ``pyro.deterministic``, and from the reparameterisers of Pyro.
    """
    if (site["infer"] or {}).get("_deterministic"):
        return True
    return bool(site["is_observed"]) and is_masked_out(site) and is_delta(site["fn"])


def is_left_by_do(site: Any) -> bool:
    """Return whether ``poutine.do`` has cut a site off from the sites after it."""
    return site.get("_intervener_id") is not None


def has_dim(shape: Sequence[int], dim: int) -> bool:
    """Return whether a shape has a size other than 1 at a dim, counted from the right."""
    return len(shape) >= -dim and shape[dim] != 1


def global_site_error(program: str, name: str) -> SiteError:
    """Return the error for a site outside the local plate that depends on draws inside it."""
    return SiteError(
        f"Site '{name}' of the {program} depends on the draws inside local_plate, but it is "
        "outside the plate. Sites outside are drawn once, and sites inside once for each particle. "
        "Move the site into the plate, or leave out local_plate."
    )
