"""The values that model and guide use, compared with those of an earlier call."""

from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.infer.evidence.block_state import BlockState
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.evidence_state import EvidenceState
from pyro_ext.tracing import Particles, Programs
from pyro_ext.tracing.fingerprint import (
    arguments_fingerprint,
    parameter_label,
    programs_fingerprint,
)


class UsedValues:
    """A record of the arguments and of the values that model and guide use, in one call.

    It compares them with those of earlier calls that added to the same state. Values that change
    while model and guide run, such as counters, are left out.

    :param state: the state.
    """

    def __init__(self, state: EvidenceState) -> None:
        self._state = state
        self._programs: Programs | None = None
        self._arguments = ""
        self._before: dict[str, str] | None = None
        self._params: set[str] = set()

    def check_arguments(self, index: int, block: DataBlock) -> None:
        """Raise a ValueError if the arguments of a block are not those of its earlier draws."""
        if block.programs is not self._programs:
            self._programs = block.programs
            self._arguments = arguments_fingerprint(block.programs)
        self._state.check_arguments(index, block, self._arguments)

    def begin(self, block: DataBlock) -> None:
        """Look at the values before the first draws of all."""
        if self._before is None and not self._state.programs:
            self._before = programs_fingerprint(block.programs)

    def see(self, block: DataBlock, state: BlockState, particles: Particles) -> None:
        """Note a chunk of draws before it is added to the state.

        :raises ValueError: if model and guide use other values than earlier calls.
        """
        state.arguments = self._arguments
        self.check_programs(block)
        for trace in (*particles.guide_traces[:1], *particles.model_traces[:1]):
            self._params |= set(map(parameter_label, trace.param_nodes))

    def check_programs(self, block: DataBlock) -> None:
        """Raise a ValueError if model and guide use other values than earlier calls.

        Call it after a run of model and guide, which may make parameters. It looks once in a call.
        """
        if self._before is None:
            found = programs_fingerprint(block.programs)
            self._state.check_programs(found)
            self._before = found

    def end(self, call: JointCall, block: DataBlock | None) -> None:
        """Check the programs, and keep for later calls what is the same in all processes.

        :param block: the last block of this process; None if it has none.
        """
        if block is not None:
            self.check_programs(block)
        first, *others = [found for found in call.gather(self._state.programs) if found] or [{}]
        self._state.programs = {
            label: value
            for label, value in first.items()
            if all(other.get(label) == value for other in others)
        }

    def remember(self) -> None:
        """Keep the values for later calls, without those that have changed during this call."""
        if self._before is None or self._programs is None or not self._state.blocks:
            return
        now = programs_fingerprint(self._programs)
        before = self._before
        kept = self._state.programs or {
            label: value
            for label, value in now.items()
            if not label.startswith("parameter ") or label in self._params
        }
        self._state.programs = {
            label: value
            for label, value in kept.items()
            if now.get(label) == before.get(label, now.get(label))
        }
