"""Which plates keep weights of their own, and which make a nonlinear bound wrong."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.infer.handlers import PARTICLE_PLATE, is_masked_out


class Plate(NamedTuple):
    """A plate that encloses a site; unlike Pyro's own frames, quick to hash."""

    name: str
    dim: int | None
    size: int
    full_size: int
    counter: int

    @property
    def is_vectorized(self) -> bool:
        """Whether the plate has a dim, rather than being iterated over."""
        return self.dim is not None

    @property
    def subsampling_scale(self) -> float:
        """Full size over the size of the subsample."""
        return self.full_size / self.size


class DensitySite(NamedTuple):
    """A sample site that adds to the density, and the plates around it but the particle plate."""

    program: str
    name: str
    node: Any
    plates: frozenset[Plate]

    @property
    def is_observed(self) -> bool:
        """Whether its value is data, or it is a factor."""
        return self.node["is_observed"]

    @property
    def log_prob(self) -> Tensor:
        """Its scaled and masked log-probability."""
        return self.node["log_prob"]


def density_sites(program: str, trace: Trace) -> list[DensitySite]:
    """The sample sites of a trace that are neither deterministic nor masked out as a whole.

    :param str program: ``"model"`` or ``"guide"``.
    """
    return [
        DensitySite(
            program,
            name,
            node,
            plates_of(node),
        )
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not is_masked_out(node)
    ]


def plates_of(node: Any) -> frozenset[Plate]:
    """The plates around a site but the particle plate."""
    return frozenset(
        Plate(f.name, f.dim, f.size, f.full_size or f.size, f.counter)
        for f in node["cond_indep_stack"]
        if f.name != PARTICLE_PLATE
    )


def find_common_plates(
    sites: Sequence[DensitySite], depends: Callable[[DensitySite], bool]
) -> tuple[Plate, ...]:
    """The vectorised plates, left to right, that enclose all that depends on the particle.

    Those are the latent sites of model and guide and the observed sites that depend on them.
    """
    latent = [site.plates for site in sites if not site.is_observed]
    stacks = latent or [site.plates for site in sites] or [frozenset()]
    common = frozenset(p for p in frozenset.intersection(*stacks) if p.is_vectorized)
    for site in sites:
        if not common <= site.plates and depends(site):
            common &= site.plates
    return tuple(sorted(common, key=lambda plate: plate.dim or 0))


def check_subsampling(
    sites: Sequence[DensitySite], common: Sequence[Plate], depends: Callable[[DensitySite], bool]
) -> None:
    """Raises if a plate is subsampled inside the bound, which is not linear."""
    for site in sites:
        for plate in site.plates.difference(common):
            if plate.subsampling_scale == 1 or (site.is_observed and not depends(site)):
                continue
            raise ValueError(
                f"Plate '{plate.name}' is subsampled ({plate.size} of {plate.full_size}) but "
                f"{_why_not_common(plate, sites)}; with more than one particle its scale would "
                "enter a nonlinear bound, which would then be wrong. Expected a vectorised plate "
                "around every latent site, or the full data. For global latents and local ones in "
                f"a plate, local_plate='{plate.name}' draws the globals once and has a bound for "
                "each point; else move globals into pyro.param, do not subsample, or use "
                "num_particles=1."
            )


def warn_of_joint_weights(sites: Sequence[DensitySite], warned: set[str]) -> None:
    """Warns once of each plate that holds all the data but has one weight for all of it.

    To be called where no plate is common.

    :param set warned: names of the plates already warned of; added to.
    """
    data = [s.plates for s in sites if s.is_observed and s.program == "model"]
    by_name = [{plate.name: plate for plate in plates} for plates in data]
    names = set.intersection(*map(set, by_name)) if by_name else set()
    for name in names - warned:
        warned.add(name)
        warnings.warn(
            f"Plate '{name}' holds all the data but {_why_not_common(by_name[0][name], sites)}: "
            "each particle gets one weight for the whole plate, which bounds the joint evidence "
            "loosely. Expected for global latent variables; otherwise use a vectorised plate, "
            "with the site inside, and a guide that draws each point by itself (AutoNormal does).",
            stacklevel=2,
        )


def _why_not_common(plate: Plate, sites: Sequence[DensitySite]) -> str:
    if not plate.is_vectorized:
        return "is sequential"
    # Latent sites first: they are what a user can move.
    outside = [site for site in sites if plate not in site.plates]
    site = min(outside, key=lambda site: site.is_observed)
    return f"does not enclose the site '{site.name}' of the {site.program}"
