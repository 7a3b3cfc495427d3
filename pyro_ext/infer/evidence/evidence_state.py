"""The state that estimate_evidence stores, to continue from it after an interrupt."""

from collections.abc import Mapping
from typing import Any

from pyro_ext._files import StrPath, read_file, write_file
from pyro_ext.infer.evidence.block_state import BlockDraws, BlockState
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.tracing.fingerprint import kind_label

_FORMAT, _VERSION = "pyro_ext evidence state", 1
#: The settings that must stay the same.
_KEPT_SETTINGS = (
    "jackknife_orders",
    "proposal_scale",
    "data_plate",
    "batch_size",
    "has_data_loader",
)


class EvidenceState:
    """The state of a run of :func:`estimate_evidence`, from which a later call continues.

    Pass the same state to each call. It is empty at first. It holds the statistics of each block of
    data points, and the random state after the last chunk. :meth:`save` and :meth:`load` keep it in
    a file.

    An interrupted run can be continued with the same ``chunk_size``. The call restores the random
    state, and the result is that of an uninterrupted run. A complete run can be continued with a
    larger ``num_samples``. The new draws differ from the earlier ones, even if you set the same
    seed again.

    Under a process group of ``torch.distributed``, each rank has the same state after a call. You
    can save it on any rank, load it on all ranks, and continue with another number of processes.
    With several processes, the draws after an interrupt differ from those of an uninterrupted run.

    Model, guide, their parameters and the data (in the same order) must stay the same. The state
    holds fingerprints of them, and a call with others raises a ValueError. The fingerprints cover
    the arguments, the parameters and buffers, and the values that model and guide reach by name. A
    value that a call itself changes, such as a counter, is not compared. The settings
    ``jackknife_orders``, ``proposal_scale``, ``data_plate`` and ``batch_size`` must stay the same,
    too.

    >>> import tempfile, torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import estimate_evidence
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
    >>> pyro.set_rng_seed(0)
    >>> state = EvidenceState()
    >>> first = estimate_evidence(model, num_samples=500, state=state)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state.save(f"{folder}/state.pt")
    ...     state = EvidenceState.load(f"{folder}/state.pt")
    >>> more = estimate_evidence(model, num_samples=2000, state=state)
    >>> more.num_samples, bool(more.std_error < first.std_error)
    (2000, True)
    """

    def __init__(self) -> None:
        self.blocks: dict[int, BlockState] = {}
        self.num_rows: int | None = None
        self.is_complete = False
        #: Fingerprints of the values that model and guide use, by their descriptions.
        self.programs: dict[str, str] = {}
        self._settings: dict[str, Any] = {}

    def save(self, path: StrPath) -> None:
        """Save the state to a file. The file holds tensors, numbers and strings only.

        :param path: the path of the file.
        :raises OSError: if the file cannot be written.
        """
        content = {**vars(self), "blocks": [(i, b.state_dict()) for i, b in self.blocks.items()]}
        write_file(path, _FORMAT, _VERSION, content)

    @classmethod
    def load(cls, path: StrPath) -> "EvidenceState":
        """Return the state that :meth:`save` wrote. A file runs no code when it is loaded.

        :param path: the path of the file.
        :raises ValueError: if the file is damaged, or is not such a state.
        :raises OSError: if the file cannot be read.
        """
        content = read_file(path, _FORMAT, _VERSION)
        state = cls()
        blocks = content.pop("blocks")
        vars(state).update(content)
        state.blocks = {index: BlockState.from_state_dict(block) for index, block in blocks}
        return state

    @property
    def latest(self) -> BlockDraws | None:
        """The draws of the block with the latest chunk; None before the first chunk."""
        draws = [block.draws for block in self.blocks.values() if block.draws is not None]
        return max(draws, key=lambda d: d.serial, default=None)

    @property
    def progress(self) -> Any:
        """Numbers and tensors that tell one state from another."""
        latest = self.latest
        sizes = sorted((index, block.num_samples) for index, block in self.blocks.items())
        return self.is_complete, sizes, latest and latest.random_states["cpu"]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError if the settings differ from the first call with draws.

        :param settings: a dict from the name of a setting to its value.
        :raises ValueError: if a setting differs.
        """
        if not self.blocks:
            self._settings = {name: settings[name] for name in _KEPT_SETTINGS}
        for name in _KEPT_SETTINGS:
            value = settings[name]
            if self._settings[name] != value:
                raise ValueError(
                    f"estimate_evidence: the state began with {name}={self._settings[name]!r}, but "
                    f"this call has {name}={value!r}. Use the same value, or a new state."
                )

    def check_arguments(self, index: int, block: DataBlock, arguments: str) -> None:
        """Raise a ValueError if the arguments of a block differ from those of its draws.

        :param index: the index of the block.
        :param block: the block.
        :param arguments: the fingerprint of its arguments.
        :raises ValueError: if there are draws of the block, from other arguments.
        """
        state = self.blocks.get(index)
        if state is None or state.arguments in (None, arguments):
            return
        if block.of_loader is None:
            raise ValueError(
                "estimate_evidence: the arguments of model and guide are not those with which the "
                "state began. Pass the same data in the same order, or a new state."
            )
        raise ValueError(
            f"estimate_evidence: the arguments of block {index + 1} of data_loader are not those "
            "with which the state began. The data are others, or come in another order. Use the "
            "same data with shuffle=False, or a new state."
        )

    def check_programs(self, programs: dict[str, str]) -> None:
        """Raise a ValueError if model and guide use other values than for the draws so far.

        :param programs: the fingerprints of the values that they use now.
        :raises ValueError: if a value differs.
        """
        changed = [
            label for label, value in self.programs.items() if programs.get(label, value) != value
        ]
        kinds = [kind_label(role) for role in ("model", "guide")]
        before = [self.programs.get(kind) for kind in kinds if self.programs]
        changed += [
            kind
            for kind, value in zip(kinds, before, strict=False)
            if programs.get(kind) != value and kind not in changed
        ]
        if changed:
            others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ValueError(
                f"estimate_evidence: {changed[0]}{others} is not what it was when the state began, "
                "so the draws so far belong to another model or guide. Restore its value, or use "
                "a new state."
            )
