import math
from typing import Any

from pyro_ext._arguments import check_integer, check_type, describe
from pyro_ext.infer.gradients.rules import GRADIENT_RULES


def check_options(
    name: str,
    num_particles: Any,
    gradient: Any,
    max_plate_nesting: Any,
    local_plate: Any,
    particle_chunk_size: Any,
) -> None:
    """Raise an error unless the options of an estimator are valid.

    :param name: the name of the estimator, for messages.
    :raises TypeError: if an option has the wrong type.
    :raises ValueError: if an option is out of range.
    :raises NotImplementedError: if ``local_plate`` and ``particle_chunk_size`` are both given.
    """
    if callable(num_particles):
        raise TypeError(
            f"{name} was called with a model. Pass an instance to SVI, such as "
            f"{name}(num_particles=5), instead of the class."
        )
    check_integer(name, "num_particles", num_particles, 1)
    if max_plate_nesting != math.inf:
        check_integer(name, "max_plate_nesting (unless infinite)", max_plate_nesting, 0)
    if particle_chunk_size is not None:
        check_integer(name, "particle_chunk_size", particle_chunk_size, 1)
    if gradient not in GRADIENT_RULES:
        raise ValueError(
            f"{name}: gradient must be one of {sorted(GRADIENT_RULES)}, but it is "
            f"{describe(gradient)}."
        )
    if local_plate is not None:
        check_type(name, "local_plate", local_plate, str, "the name of a plate")
    if local_plate is not None and particle_chunk_size is not None:
        raise NotImplementedError(
            f"{name}: local_plate does not support particle_chunk_size, because each chunk "
            "would draw its own global sites. Leave out one of them."
        )
