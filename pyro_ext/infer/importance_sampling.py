import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer, check_real
from pyro_ext.infer.data_blocks import (
    DataBlock,
    RowsOfPlate,
    blocks_of_loader,
    blocks_of_plate,
)
from pyro_ext.infer.evidence import Evidence, concatenate
from pyro_ext.infer.evidence_state import BlockDraws, BlockState, EvidenceState
from pyro_ext.infer.proposals import WidenedProposal
from pyro_ext.infer.streaming import ParticleStream, data_points
from pyro_ext.ops import MIN_DRAWS
from pyro_ext.ops.random_state import get_random_state, set_random_state

NAME = "estimate_evidence"


@torch.no_grad()
def estimate_evidence(
    model: Callable,
    guide: Callable | None = None,
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    jackknife_orders: Iterable[int] = (1,),
    target_std_error: float | None = None,
    proposal_scale: float = 1.0,
    data_plate: str | None = None,
    batch_size: int | None = None,
    data_loader: Iterable[Any] | None = None,
    state: EvidenceState | None = None,
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> Evidence:
    r"""Estimates the log evidence by importance sampling with the guide as proposal.

    .. math::

        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^{S} w_s, \qquad
        \mathrm{SE} = \sqrt{\frac{1}{S} \Bigl( \frac{\overline{w^2}}{\bar w^2} - 1 \Bigr)}, \qquad
        \mathrm{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}

    Nothing is differentiated. The programs run on ``chunk_size`` particles at a time, and the
    weights go into running statistics in float64, so that memory hardly grows with S; with
    ``batch_size`` or ``data_loader`` it does not grow with the data either, but for the results.
    The draws depend on these sizes: torch fills a chunk's tensors one after the other, so that
    other chunks get other numbers from the same seed. The subsampling scale, and a scale of the
    user that is the same at every site, are left out: the evidence is that of the data seen.

    An interrupt (Ctrl-C) ends the sampling, with a warning, and the draws so far are the result.

    Sources: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders; Owen
    (2013), Monte Carlo Theory, Methods and Examples, chapter 9; Nowozin (2018), Debiasing
    Evidence Approximations.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, likewise. None for the prior as proposal, which is plain Monte Carlo.
    :param args: positional arguments of both.
    :param int num_samples: the number of draws S >= 1.
    :param int chunk_size: how many particles run at once; at most 100 by default. 1 suits
        programs that cannot take the extra dim of vectorised particles.
    :param jackknife_orders: orders m < S of the jackknife estimates.
    :param float target_std_error: stop, after 100 draws or more, as soon as the standard error of
        each data point (of a block) is no larger; None to draw all.
    :param float proposal_scale: what to multiply the guide's scales by, positive. More than 1
        widens a guide whose tails are too light. Every site has to be of a location-scale family,
        as those of AutoNormal, AutoMultivariateNormal and other AutoContinuous guides are.
    :param str data_plate: the name of the plate whose rows are taken in blocks.
    :param int batch_size: how many of its rows the programs see at once. They have to use the
        indices that the plate yields (or ``pyro.subsample``), and a subsample size of the plate,
        if it has one, has to be the same. Every row counts once. Automatic guides need
        ``create_plates``, with a plate without subsample size.
    :param data_loader: batches to run the programs on, each of them positional arguments before
        ``args`` (a tensor, or a tuple or list of several), or keyword arguments (a dict). With
        several common plates, ``data_plate`` names that of the rows.
    :param EvidenceState state: where to go on from, and where to keep what a later call needs to
        go on; None to begin anew and keep nothing.
    :param bool progress_bar: whether to show one.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: an :class:`Evidence`; under a subsampled plate without ``batch_size``, for one
        minibatch.
    :raises ValueError: if an argument is out of range or does not fit the others, if log weights
        are NaN, if all weights of a data point are zero, if a site has no scale to be multiplied,
        and where :class:`MultiSampleELBO` raises it.

    It warns where a Pareto k is above 0.7.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
    >>> pyro.set_rng_seed(0)
    >>> evidence = estimate_evidence(model, guide, torch.tensor([0.0, 1.0]), num_samples=10_000)
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0, 1.0]))
    >>> bool(((evidence.log_evidence - exact).abs() < 4 * evidence.std_error).all())
    True
    """
    if target_std_error is not None:
        check_real(NAME, "target_std_error", target_std_error, 0.0, math.inf)
    _check_blocks(data_plate, batch_size, data_loader)
    stream = ParticleStream(NAME, model, guide, num_samples, chunk_size, 100, max_plate_nesting)
    orders = checked_orders(NAME, jackknife_orders, num_samples)
    _check_proposal_scale(proposal_scale)
    if proposal_scale != 1:
        stream.guide = WidenedProposal(stream.guide, proposal_scale)
    is_kept = state is not None
    state = EvidenceState() if state is None else state
    state.check_settings(
        jackknife_orders=orders,
        proposal_scale=float(proposal_scale),
        data_plate=data_plate,
        batch_size=batch_size,
        has_data_loader=data_loader is not None,
    )
    blocks = iter([DataBlock(args, kwargs)])
    if data_loader is not None:
        blocks = blocks_of_loader(data_loader, data_plate, args, kwargs)
    elif batch_size is not None:
        rows = RowsOfPlate(str(data_plate), batch_size, state.num_rows)
        blocks = blocks_of_plate(rows, args, kwargs)
    with tqdm(desc=NAME, unit="draw", disable=not progress_bar) as bar:
        evidence = _Sampler(stream, orders, target_std_error, state, is_kept, bar).run(blocks)
    warn_of_heavy_tails(
        NAME,
        evidence,
        "Widen the guide (proposal_scale=1.5) or train it further; more draws help slowly.",
    )
    return evidence


class _Sampler:
    """Draws for one block of data after the other."""

    def __init__(
        self,
        stream: ParticleStream,
        orders: tuple[int, ...],
        target_std_error: float | None,
        state: EvidenceState,
        is_kept: bool,
        bar: "tqdm[Any]",
    ) -> None:
        self.stream = stream
        self.orders = orders
        self.target_std_error = target_std_error
        self.state = state
        self.is_kept = is_kept
        self.bar = bar
        self.parts: list[Evidence] = []
        self.position = self.num_rows = self.num_chunks = 0
        self._resume_from = state.latest
        self._caller_random_state: Any = None

    def run(self, blocks: Iterator[DataBlock]) -> Evidence:
        """The evidence of all blocks, or of what there is at an interrupt."""
        block = None
        try:
            for index, block in enumerate(blocks):
                if not block.is_whole:
                    block.first_row = self.num_rows
                self._draw(index, block)
                self._finish(index)
            self.state.is_complete = True
        except (RuntimeError, ValueError, IndexError) as error:
            is_ours = str(error).startswith(NAME)
            if block is not None and isinstance(block.subsamples, RowsOfPlate) and not is_ours:
                error.add_note(
                    f"With batch_size={block.subsamples.batch_size}, model and guide have to index "
                    f"their data by what pyro.plate('{block.plate}') yields, or pyro.subsample."
                )
            raise
        except KeyboardInterrupt:
            unfinished = len(self.parts)
            if unfinished in self.state.blocks:
                self._finish(unfinished)
            if not self.parts:
                raise
            rows = "" if block is None or block.is_whole else f" and {self.num_rows} data points"
            warnings.warn(
                f"{NAME} was interrupted: the result is that of {self.parts[-1].num_samples} of "
                f"{self.stream.num_samples} draws{rows}.",
                stacklevel=4,
            )
        finally:
            if self._caller_random_state is not None:
                set_random_state(self._caller_random_state)
        if not self.parts:
            raise ValueError(f"{NAME}: expected a data_loader with batches, got none.")
        return concatenate(self.parts, self.position)

    def _draw(self, index: int, block: DataBlock) -> None:
        state = self.state.blocks.get(index)
        start = 0 if state is None else state.num_samples
        self.bar.update(start)
        if start >= self.stream.num_samples or (state is not None and self._is_reached(state)):
            return
        if self._resume_from is not None:
            self._resume(block, self._resume_from)
            self._resume_from = None
        for particles, num_used in self.stream.draw(block, start, self.bar):
            log_w = particles.log_w[:num_used]
            if state is None:
                position = 0 if block.is_whole else block.position(particles.plates)
                plates = tuple(plate.name for plate in particles.plates)
                state = BlockState(plates, position, block.outer(particles))
            if not block.is_whole:
                num_new = block.num_new_rows(particles)
                dim = 1 + state.position
                log_w = log_w.narrow(dim, log_w.shape[dim] - num_new, num_new)
            del particles
            self.num_chunks += 1
            state.add(log_w, self.orders, self.stream.num_samples, self.num_chunks)
            self.state.blocks[index] = state
            self.state.num_rows = block.size
            self._show(state, block)
            if self._is_reached(state):
                break

    def _resume(self, block: DataBlock, draws: BlockDraws) -> None:
        self.num_chunks = draws.serial
        if self.state.is_complete:
            # Neither the numbers that follow on the saved state nor those of a seed: both may have
            # been used.
            on_cpu, on_cuda = draws.random_state
            states = b"".join(state.numpy().tobytes() for state in (on_cpu, *on_cuda))
            digest = hashlib.sha256(states).digest()
            self._caller_random_state = get_random_state()
            torch.manual_seed(int.from_bytes(digest[:8]))
        else:
            # A first run may draw numbers of its own, as to set up an automatic guide.
            self.stream.run(block)
            set_random_state(draws.random_state)
        self.state.is_complete = False

    def _finish(self, index: int) -> None:
        state = self.state.blocks[index]
        part = state.to_evidence(self.orders)
        is_zero = part.log_evidence.isneginf()
        if is_zero.any():
            offset = [self.num_rows * (i == state.position) for i in range(is_zero.dim())]
            raise ValueError(
                f"{NAME}: expected draws with weights above zero, and all {part.num_samples} "
                f"weights are zero{data_points(is_zero, tuple(offset))}. The guide's support "
                "misses what the data allow: use a wider guide, or more draws."
            )
        self.parts.append(part)
        self.position = state.position
        if part.plates:
            self.num_rows += part.log_evidence.shape[state.position]
        if not self.is_kept:
            del self.state.blocks[index]

    def _is_reached(self, state: BlockState) -> bool:
        if self.target_std_error is None or state.draws is None or state.num_samples < 100:
            return False
        return bool((state.draws.statistics.std_error <= self.target_std_error).all())

    def _show(self, state: BlockState, block: DataBlock) -> None:
        if self.bar.disable or state.draws is None:
            return
        self.bar.total = block.num_blocks and block.num_blocks * self.stream.num_samples
        means = [part.log_evidence for part in self.parts] + [state.draws.statistics.log_mean]
        total = sum(mean.sum().item() for mean in means)
        self.bar.set_postfix_str(f"{total / sum(mean.numel() for mean in means):.4f} nats")


def warn_of_heavy_tails(owner: str, evidence: Evidence, advice: str) -> None:
    """Warns, in the name of an estimate, of data points with a Pareto k above 0.7."""
    # Weights that differ by rounding have a tail of nothing else.
    is_heavy = (evidence.pareto_k > 0.7) & (evidence.ess < 0.99 * evidence.num_samples)
    if evidence.num_samples >= MIN_DRAWS and is_heavy.any():
        warnings.warn(
            f"{owner}: Pareto k is above 0.7{data_points(is_heavy)}: a few draws carry the "
            f"estimate, and its standard error is too small. {advice}",
            stacklevel=4,
        )


def checked_orders(
    owner: str, jackknife_orders: Iterable[int], num_samples: int
) -> tuple[int, ...]:
    """The orders of a jackknife as a tuple; raises a ValueError unless each is below the draws."""
    if not isinstance(jackknife_orders, Iterable):
        raise ValueError(
            f"{owner}: expected jackknife_orders to hold integers, got {jackknife_orders!r}."
        )
    orders = tuple(jackknife_orders)
    for order in orders:
        check_integer(owner, "each of jackknife_orders", order, 0)
        if order >= num_samples:
            raise ValueError(
                f"{owner}: expected jackknife_orders below the number of draws, {num_samples}, "
                f"got {orders}; for one draw, pass jackknife_orders=()."
            )
    return orders


def _check_proposal_scale(proposal_scale: float) -> None:
    check_real(NAME, "proposal_scale", proposal_scale, 0.0, math.inf)
    if proposal_scale in (0, math.inf):
        raise ValueError(f"{NAME}: expected 0 < proposal_scale < inf, got {proposal_scale!r}.")


def _check_blocks(
    data_plate: str | None, batch_size: int | None, data_loader: Iterable[Any] | None
) -> None:
    if batch_size is not None:
        check_integer(NAME, "batch_size", batch_size, 1)
        if data_plate is None or data_loader is not None:
            raise ValueError(
                f"{NAME}: expected batch_size={batch_size} with data_plate, the name of a plate, "
                "and without data_loader, whose batches have a size of their own."
            )
    elif data_plate is not None and data_loader is None:
        raise ValueError(
            f"{NAME}: expected data_plate={data_plate!r} with batch_size or data_loader."
        )
    if data_loader is not None and not isinstance(data_loader, Iterable):
        raise ValueError(f"{NAME}: expected data_loader to yield batches, got {data_loader!r}.")
