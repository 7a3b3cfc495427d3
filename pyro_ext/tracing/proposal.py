from dataclasses import replace

from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message

from pyro_ext.tracing.programs import Programs


def with_proposal(programs: Programs) -> Programs:
    """Return the programs with a guide that counts only the density of its draws.

    A guide may observe auxiliary sites. Their density is part of the ELBO, but not of the density
    from which the guide draws. Factors count, because they correct this density.
    """
    if programs.guide_runs_model:  # it has no observed sites of its own
        return programs
    return replace(programs, guide=_WithoutObservations()(programs.guide))


class _WithoutObservations(Messenger):
    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] and not isinstance(msg["fn"], Unit):
            msg["mask"] = False
