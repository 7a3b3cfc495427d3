"""The state that estimate_evidence stores, to continue from it after an interrupt."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ext._random_states import RandomStates, random_states
from pyro_ext.infer.evidence.evidence import Evidence, EvidenceHistory
from pyro_ext.ops import WeightStatistics


class EvidenceState:
    """The state of a run of :func:`estimate_evidence`, from which a later call continues.

    Pass the same state to each call. It is empty at first, and can be pickled. It holds the
    statistics of each block of data points, and the random state after the last chunk.

    An interrupted run can be continued with the same ``chunk_size``. The call restores the random
    state, and the result is that of an uninterrupted run. A complete run can be continued with a
    larger ``num_samples``. The new draws differ from the earlier ones, even if you set the same
    seed again. Model, guide and data (in the same order) must stay the same. The same holds for
    ``jackknife_orders``, ``proposal_scale``, ``data_plate`` and ``batch_size``.

    >>> import pickle, torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import estimate_evidence
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
    >>> pyro.set_rng_seed(0)
    >>> state = EvidenceState()
    >>> first = estimate_evidence(model, num_samples=500, state=state)
    >>> state = pickle.loads(pickle.dumps(state))
    >>> more = estimate_evidence(model, num_samples=2000, state=state)
    >>> more.num_samples, bool(more.std_error < first.std_error)
    (2000, True)
    """

    def __init__(self) -> None:
        self.blocks: dict[int, BlockState] = {}
        self.num_rows: int | None = None
        self.is_complete = False
        self._settings: dict[str, Any] = {}

    @property
    def latest(self) -> "BlockDraws | None":
        """The draws of the block with the latest chunk; None before the first chunk."""
        draws = [block.draws for block in self.blocks.values() if block.draws is not None]
        return max(draws, key=lambda d: d.serial, default=None)

    def check_settings(self, **settings: Any) -> None:
        """Raise a ValueError if the settings differ from the first call with draws.

        :param settings: a dict from the name of a setting to its value.
        :raises ValueError: if a setting differs.
        """
        if not self.blocks:
            self._settings = settings
        for name, value in settings.items():
            if self._settings[name] != value:
                raise ValueError(
                    f"estimate_evidence: the state began with {name}={self._settings[name]!r}, but "
                    f"this call has {name}={value!r}. Use the same value, or a new state."
                )


class HistoryEntry(NamedTuple):
    """The estimates from a number of draws."""

    num_samples: int
    log_mean: Tensor
    std_error: Tensor
    jackknife: dict[int, Tensor]


class BlockDraws(NamedTuple):
    """The draws of a block of data points.

    They are replaced as a whole, so that an interrupt cannot leave them half updated.

    :ivar statistics: the statistics of the weights.
    :ivar history: the estimates at 1, 2, 4, ... draws.
    :ivar random_states: the random states after the draws.
    :ivar serial: the number of chunks drawn so far, in all blocks together.
    """

    statistics: WeightStatistics
    history: tuple[HistoryEntry, ...]
    random_states: RandomStates
    serial: int


class BlockState:
    """A block of data points, with its position in the tensors and its draws.

    :param plates: the names of the common plates.
    :param position: the index of the common plate that holds the rows.
    :param outer: the sum of the outer terms.
    """

    def __init__(self, plates: tuple[str, ...], position: int, outer: float) -> None:
        self.plates = plates
        self.position = position
        self.outer = outer
        self.draws: BlockDraws | None = None

    @property
    def num_samples(self) -> int:
        """The number of draws so far."""
        return 0 if self.draws is None else self.draws.statistics.num_samples

    def add(self, log_w: Tensor, orders: tuple[int, ...], num_samples: int, serial: int) -> None:
        """Add draws.

        :param log_w: their log weights, of shape ``(n, *common)``.
        :param orders: the orders of the jackknife.
        :param num_samples: the planned number of draws.
        :param serial: the number of chunks drawn so far, in all blocks together.
        """
        statistics = WeightStatistics(num_samples)
        history: tuple[HistoryEntry, ...] = ()
        if self.draws is not None:
            statistics, history = copy.copy(self.draws.statistics), self.draws.history
            statistics.plan(num_samples)
            found = statistics.log_mean.shape
            if log_w.shape[1:] != found:
                raise ValueError(
                    f"estimate_evidence: the state has data points of shape {tuple(found)}, but "
                    f"this call has shape {tuple(log_w.shape[1:])}. Use the same data, or a new "
                    "state."
                )
        while len(log_w):
            # Stop at each power of two, where the history gets an entry.
            room = (1 << statistics.num_samples.bit_length()) - statistics.num_samples
            piece, log_w = log_w.tensor_split([room])
            statistics.update(piece)
            if statistics.num_samples.bit_count() == 1:
                history = (*history, _entry(statistics, orders))
        self.draws = BlockDraws(statistics, history, random_states(), serial)

    def to_evidence(self, orders: tuple[int, ...]) -> Evidence:
        """Return the estimates from the draws so far."""
        assert self.draws is not None  # called only after the first draws
        statistics, history, *_ = self.draws
        latest = _entry(statistics, orders)
        if history[-1].num_samples < latest.num_samples:
            history = (*history, latest)
        # Without common plates there is one total, and it includes the outer terms.
        constant, outer = (0.0, self.outer) if self.plates else (self.outer, 0.0)
        return Evidence(
            log_evidence=latest.log_mean + constant,
            std_error=latest.std_error,
            ess=statistics.ess,
            pareto_k=statistics.pareto_k,
            jackknife={order: latest.jackknife[order] + constant for order in orders},
            outer=outer,
            num_samples=latest.num_samples,
            plates=self.plates,
            history=EvidenceHistory(
                num_samples=tuple(entry.num_samples for entry in history),
                log_evidence=torch.stack([entry.log_mean for entry in history]) + constant,
                std_error=torch.stack([entry.std_error for entry in history]),
                jackknife={
                    order: torch.stack([entry.jackknife[order] for entry in history]) + constant
                    for order in orders
                },
            ),
        )


def _entry(statistics: WeightStatistics, orders: tuple[int, ...]) -> HistoryEntry:
    return HistoryEntry(
        statistics.num_samples,
        statistics.log_mean,
        statistics.std_error,
        {order: statistics.jackknife(order) for order in orders},
    )
