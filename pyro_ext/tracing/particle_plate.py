from typing import Any

from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger

from pyro_ext.tracing.programs import Program
from pyro_ext.tracing.sites import PARTICLE_PLATE, has_particles


class ParticlePlate(IndepMessenger):
    """The plate of the particles, around all sites or around the sites of one user plate.

    Unlike ``pyro.plate``, it has no minibatch, and passes over parameters.

    :param size: the number of particles.
    :param dim: the dim of the plate, negative and to the left of all other plates.
    :param local_plate: the name of the user's plate whose sites are drawn once for each particle;
        None if all sites are.
    """

    def __init__(self, size: int, dim: int, local_plate: str | None = None) -> None:
        super().__init__(PARTICLE_PLATE, size, dim)
        self.local_plate = local_plate

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and has_particles(msg, self.local_plate):
            super()._process_message(msg)
            BroadcastMessenger._pyro_sample(msg)


def plated(model: Program, num_particles: int, max_plate_nesting: int) -> Program:
    """Return a model with its particles in a plate to the left of all others.

    A single particle needs no plate, so the model is returned unchanged.
    """
    if num_particles == 1:
        return model
    plate: Any = ParticlePlate(num_particles, -max_plate_nesting - 1)
    return plate(model)
