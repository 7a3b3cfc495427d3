"""The result of one run of an estimator."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One estimate of a log evidence.

    :ivar log_evidence: the estimate, in nats.
    :ivar evaluations: the number of evaluations of the joint density. A gradient counts as one.
    :ivar std_error: the reported standard error; NaN if there is none.
    :ivar flags: the names of the flags.
    """

    log_evidence: float
    evaluations: int
    std_error: float = math.nan
    flags: tuple[str, ...] = ()
