"""The draws for one block of data points, with the estimates from them."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ext._random_states import RandomStates
from pyro_ext.infer.evidence.evidence import Evidence, EvidenceHistory
from pyro_ext.ops import LogMoments, WeightStatistics


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
    :param full_size: the number of rows that the plate is meant to have; None if it is not known.
    :param arguments: the fingerprint of the arguments of model and guide; None if none is kept.
    """

    def __init__(
        self,
        plates: tuple[str, ...],
        position: int,
        outer: float,
        full_size: int | None = None,
        arguments: str | None = None,
    ) -> None:
        self.plates = plates
        self.position = position
        self.outer = outer
        self.full_size = full_size
        self.arguments = arguments
        self.draws: BlockDraws | None = None

    @property
    def num_samples(self) -> int:
        """The number of draws so far."""
        return 0 if self.draws is None else self.draws.statistics.num_samples

    @property
    def num_rows(self) -> int:
        """The number of rows with draws."""
        if self.draws is None or not self.plates:
            return 0
        return self.draws.statistics.log_mean.shape[self.position]

    def add(
        self,
        log_w: Tensor,
        orders: tuple[int, ...],
        num_samples: int,
        serial: int,
        random_states: RandomStates,
    ) -> None:
        """Add draws.

        :param log_w: their log weights, of shape ``(n, *common)``.
        :param orders: the orders of the jackknife.
        :param num_samples: the planned number of draws.
        :param serial: the number of chunks drawn so far, in all blocks together.
        :param random_states: the random states after the draws.
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
        self.draws = BlockDraws(statistics, history, random_states, serial)

    def state_dict(self) -> dict[str, Any]:
        """Return the block as tensors, numbers, strings and containers of these."""
        state = {name: value for name, value in vars(self).items() if name != "draws"}
        if self.draws is not None:
            statistics, history, states, serial = self.draws
            inner = {
                name: vars(value) if _is_moments(value) else value
                for name, value in vars(statistics).items()
            }
            state["draws"] = {
                "statistics": inner,
                "history": history,
                "random_states": states,
                "serial": serial,
            }
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "BlockState":
        """Return the block with a given state.

        :param state: a result of :meth:`state_dict`, also if it comes from a file.
        """
        state = dict(state)
        draws = state.pop("draws", None)
        block = cls(**state)
        if draws is not None:
            statistics = WeightStatistics(0)
            for name, value in draws["statistics"].items():
                if _is_moments(getattr(statistics, name)):
                    vars(getattr(statistics, name)).update(value)
                else:
                    setattr(statistics, name, value)
            history = tuple(HistoryEntry(*entry) for entry in draws["history"])
            block.draws = BlockDraws(**{**draws, "statistics": statistics, "history": history})
        return block

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


def _is_moments(value: Any) -> bool:
    return isinstance(value, LogMoments)
