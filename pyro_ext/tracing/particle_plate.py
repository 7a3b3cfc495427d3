from typing import Any

import pyro

from pyro_ext.tracing.programs import Program
from pyro_ext.tracing.sites import PARTICLE_PLATE, has_particles


class ParticlePlate(pyro.plate):
    """The plate of the particles, around every site or around those in one plate of the user.

    :param int size: the number of particles.
    :param int dim: its dim, to the left of all others.
    :param str local_plate: the name of the user's plate; None for every site.
    """

    def __init__(self, size: int, dim: int, local_plate: str | None = None) -> None:
        super().__init__(PARTICLE_PLATE, size, dim=dim)
        self.local_plate = local_plate

    def _process_message(self, msg: Any) -> None:
        if has_particles(msg, self.local_plate):
            super()._process_message(msg)


def plated(model: Program, num_particles: int, max_plate_nesting: int) -> Program:
    """A model with its particles in a plate to the left of all others; one needs no plate."""
    if num_particles == 1:
        return model
    plate: Any = ParticlePlate(num_particles, -max_plate_nesting - 1)
    return plate(model)
