"""Mistakes that users make. Run ``python -m tests.mistakes`` to print their messages."""

from tests.mistakes import in_arguments, in_particles, in_programs
from tests.mistakes.mistake import Mistake, message_of

MISTAKES: dict[str, Mistake] = in_arguments.MISTAKES | in_programs.MISTAKES | in_particles.MISTAKES

__all__ = ["MISTAKES", "message_of"]
