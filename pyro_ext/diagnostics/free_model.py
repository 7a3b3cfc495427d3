from pyro.poutine.runtime import Message
from pyro.poutine.uncondition_messenger import UnconditionMessenger

from pyro_ext.tracing import Program
from pyro_ext.tracing.sites import is_deterministic


def free_model(model: Program) -> Program:
    """Return a model that draws its observations. Its deterministic sites stay as they are."""
    return _FreeObservations()(model)


class _FreeObservations(UnconditionMessenger):
    def _pyro_sample(self, msg: Message) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)
