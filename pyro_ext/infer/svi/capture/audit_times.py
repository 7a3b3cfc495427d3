import random


class AuditTimes:
    """The runs of a graph after which its results are compared with those of the programs.

    The gaps between them are random, so that no pattern of edits escapes. The first run is audited.
    After that, the longest possible gap doubles with each audit, up to ``audit_every`` runs.

    :param audit_every: the longest gap, >= 1.
    :param seed: the seed of the gaps.
    """

    def __init__(self, audit_every: int = 1, seed: int = 0) -> None:
        self._audit_every = audit_every
        self._random = random.Random(seed)
        self._longest = 1
        self._num_left = 1

    def is_due(self) -> bool:
        """Count a run, and return whether to audit it."""
        self._num_left -= 1
        if self._num_left > 0:
            return False
        self._longest = min(2 * self._longest, self._audit_every)
        self._num_left = self._random.randint(max(1, 3 * self._longest // 4), self._longest)
        return True
