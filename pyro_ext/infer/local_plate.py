"""Particles in one plate of the user only: one draw of the sites outside, K of those inside."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext.infer.handlers import PARTICLE_PLATE, is_delta, lies_in, outside_of_local_plate
from pyro_ext.infer.plates import DensitySite


class SharedGlobals(Messenger):
    """Gives every run under it the draws outside of a plate that the first run made.

    :param str plate: the name of the plate.
    """

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg) or lies_in(msg, self.plate)):
            self.values.setdefault(msg["name"], msg["value"])


class ParticlePlate(pyro.plate):
    """The plate of the particles, around every site or around those in one plate of the user.

    :param int size: the number of particles.
    :param int dim: its dim, to the left of all others.
    :param str local_plate: the name of the user's plate; None for every site.
    """

    def __init__(self, size: int, dim: int, local_plate: str | None) -> None:
        super().__init__(PARTICLE_PLATE, size, dim=dim)
        self.local_plate = local_plate

    def _process_message(self, msg: Any) -> None:
        if self.local_plate is None or lies_in(msg, self.local_plate):
            super()._process_message(msg)


def check_local_plate(
    local_plate: str,
    by_particle: Sequence[Sequence[DensitySite]],
    has_provenance: Callable[[DensitySite], bool] | None,
) -> None:
    """Raises if a plate cannot hold the particles.

    :param str local_plate: the name of the plate.
    :param by_particle: the sites of each pair of traces.
    :param has_provenance: tells of a site outside whether it comes from the draws inside; None if
        that is not to be found out.
    """
    sites = by_particle[0]
    inside = [site for site in sites if lies_in(site.node, local_plate)]
    names = sorted({plate.name for site in sites for plate in site.plates if plate.is_vectorized})
    if local_plate not in names:
        raise ValueError(
            f"local_plate='{local_plate}': expected one of the vectorised plates, {names}."
        )
    drawn = [site for site in inside if site.program == "guide" and not site.is_observed]
    if all(is_delta(site.node["fn"]) for site in drawn):
        raise ValueError(
            f"local_plate='{local_plate}': expected the guide to draw a latent site inside of the "
            f"plate, for which the particles differ, got {sorted({site.name for site in inside})}, "
            "which are observed or points (Delta, as of guides that draw all sites at once)."
        )
    for site in sites:
        if lies_in(site.node, local_plate):
            continue
        if (has_provenance is not None and has_provenance(site)) or _differs(by_particle, site):
            raise ValueError(outside_of_local_plate(site.program, site.name))


def _differs(by_particle: Sequence[Sequence[DensitySite]], site: DensitySite) -> bool:
    # By more than rounding: the first particle may know a transform's inverse, later ones not.
    return any(
        not torch.allclose(other.log_prob, site.log_prob, rtol=1e-3, atol=1e-3, equal_nan=True)
        for row in by_particle[1:]
        for other in row
        if other[:2] == site[:2]
    )
