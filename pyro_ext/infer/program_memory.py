from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from pyro_ext.infer.dependence import Provenance


@dataclass
class ProgramPair:
    """The pair of programs that was run last."""

    model: Any = None
    guide: Any = None

    def is_of(self, model: Any, guide: Any) -> bool:
        """Whether these are the two programs."""
        return _is_same(self.model, model) and _is_same(self.guide, guide)


@dataclass
class ProgramMemory(ProgramPair):
    """What a multi-sample estimator has found out about its pair of programs."""

    plate_nesting: float | None = None
    provenance: Provenance = field(default_factory=Provenance)
    warned_plates: set[str] = field(default_factory=set)


def _is_same(program: Any, other: Any) -> bool:
    # A bound method is a new object at each access; other callables may not compare to a bool.
    return program is other or (isinstance(program, MethodType) and bool(program == other))
