from pyro.poutine.runtime import Message
from pyro.poutine.uncondition_messenger import UnconditionMessenger

from pyro_ext.tracing import Program


def free_model(model: Program) -> Program:
    """Return a model that draws its observations. Its deterministic sites stay as they are."""
    return _FreeObservations()(model)


class _FreeObservations(UnconditionMessenger):
    def _pyro_sample(self, msg: Message) -> None:
        if not (msg["infer"] or {}).get("_deterministic"):
            super()._pyro_sample(msg)
