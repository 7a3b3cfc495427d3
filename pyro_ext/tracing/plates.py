"""Plates whose elements have separate weights, and plates that make a nonlinear bound wrong."""

import warnings
from collections.abc import Callable, Sequence

from pyro_ext._arguments import abbreviate
from pyro_ext.tracing.advice import Advice
from pyro_ext.tracing.density_sites import DensitySite, Plate
from pyro_ext.tracing.sites import global_site_error, is_delta, lies_in

Depends = Callable[[DensitySite], bool]


def find_common_plates(sites: Sequence[DensitySite], depends: Depends) -> tuple[Plate, ...]:
    """Return the vectorised plates around all particle-dependent sites, from left to right.

    These sites are the latent sites of model and guide, and the observed sites that depend on them.

    :param sites: the sites of model and guide.
    :param depends: a function that returns whether a site depends on the particle.
    """
    latent = [site.plates for site in sites if not site.is_observed]
    stacks = latent or [site.plates for site in sites] or [frozenset()]
    common = frozenset(p for p in frozenset.intersection(*stacks) if p.is_vectorized)
    for site in sites:
        if not common <= site.plates and depends(site):
            common &= site.plates
    return tuple(sorted(common, key=lambda plate: plate.dim or 0))


def check_subsampling(
    sites: Sequence[DensitySite], common: Sequence[Plate], depends: Depends, advice: Advice
) -> None:
    """Raise a ValueError if a plate is subsampled inside a nonlinear bound."""
    for site in sites:
        for plate in site.plates.difference(common):
            if plate.subsampling_scale == 1 or (site.is_observed and not depends(site)):
                continue
            way_out = (
                advice.local_plate.format(plate=plate.name)
                if plate.is_vectorized
                else "Make it a vectorised plate (with, not for), or use all of its rows"
            )
            raise ValueError(
                f"Plate '{plate.name}' is subsampled ({plate.size} of {plate.full_size}) but "
                f"{_why_not_common(plate, sites)}. With more than one particle, its scale would "
                f"make the nonlinear bound wrong. {way_out}{advice.one_particle}."
            )


def warn_of_joint_weights(sites: Sequence[DensitySite], warned: set[str]) -> None:
    """Warn once about each plate that holds all the data but has a single weight.

    Call this function only if there is no common plate.

    :param sites: the sites of model and guide.
    :param warned: the names of the plates with an earlier warning. New names are added.
    """
    data = [s.plates for s in sites if s.is_observed and s.program == "model"]
    by_name = [{plate.name: plate for plate in plates} for plates in data]
    names = set.intersection(*map(set, by_name)) if by_name else set()
    for name in names - warned:
        warned.add(name)
        warnings.warn(
            f"Plate '{name}' holds all the data but {_why_not_common(by_name[0][name], sites)}. "
            "Each particle has one weight for the whole plate, and the bound of the joint evidence "
            "is loose. This is normal for global latent variables. Otherwise put the site in a "
            "vectorised plate, and use a guide that draws each data point separately (such as "
            "AutoNormal).",
            stacklevel=2,
        )


def _why_not_common(plate: Plate, sites: Sequence[DensitySite]) -> str:
    if not plate.is_vectorized:
        return "is sequential"
    # Name a latent site if possible, because the user can move it.
    outside = [site for site in sites if plate not in site.plates]
    site = min(outside, key=lambda site: site.is_observed)
    return f"does not enclose the site '{site.name}' of the {site.program}"


def check_local_plate(local_plate: str, sites: Sequence[DensitySite], depends: Depends) -> None:
    """Raise a ValueError if the local plate cannot hold the particles.

    :param local_plate: the name of the plate.
    :param sites: the sites of a model trace and its guide trace.
    :param depends: a function that returns whether a site depends on the draws inside the plate.
    :raises ValueError: if no vectorised plate has this name, if the guide draws nothing inside the
        plate, or if a site outside depends on the draws inside.
    """
    names = sorted({plate.name for site in sites for plate in site.plates if plate.is_vectorized})
    if local_plate not in names:
        raise ValueError(
            f"local_plate='{local_plate}' is not one of the vectorised plates, "
            f"{abbreviate(names)}. Pass one of their names."
        )
    inside = [site for site in sites if lies_in(site.node, local_plate)]
    drawn = [site for site in inside if site.program == "guide" and not site.is_observed]
    if all(is_delta(site.node["fn"]) for site in drawn):
        raise ValueError(
            f"local_plate='{local_plate}': the guide draws no latent site inside the plate. The "
            f"sites {abbreviate(sorted({site.name for site in inside}))} are observed or points "
            "(Delta, as in guides that draw all sites at once). Use a guide that draws each site "
            "separately, or leave out local_plate."
        )
    for site in sites:
        if not lies_in(site.node, local_plate) and depends(site):
            raise global_site_error(*site.key)
