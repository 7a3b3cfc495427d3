"""Particles in one plate of the user only: one draw of the sites outside, K of those inside."""

from collections.abc import Sequence
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext.infer.dependence import differs_between
from pyro_ext.infer.handlers import PARTICLE_PLATE, lies_in, outside_of_local_plate
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


def check_local_plate(local_plate: str, by_particle: Sequence[Sequence[DensitySite]]) -> None:
    """Raises if a plate cannot hold the particles.

    :param str local_plate: the name of the plate.
    :param by_particle: the sites of each pair of traces.
    """
    sites = [site for row in by_particle for site in row]
    inside = [site for site in sites if lies_in(site.node, local_plate)]
    names = sorted({plate.name for site in sites for plate in site.plates if plate.is_vectorized})
    if local_plate not in names:
        raise ValueError(
            f"local_plate='{local_plate}': expected one of the vectorised plates, {names}."
        )
    if all(site.is_observed for site in inside):
        raise ValueError(
            f"local_plate='{local_plate}': expected a latent site inside of the plate, for which "
            f"the particles differ, got {sorted({site.name for site in inside})}, all observed."
        )
    for site in sites:
        if site not in inside and differs_between(by_particle, site):
            raise ValueError(outside_of_local_plate(site.program, site.name))
