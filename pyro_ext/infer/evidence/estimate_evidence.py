import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.infer import SVI
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer, check_positive, check_real, check_type
from pyro_ext.infer.evidence.checks import checked_orders, warn_of_heavy_tails
from pyro_ext.infer.evidence.data_blocks import DataBlock, blocks_of_loader, blocks_of_plate
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.infer.evidence.evidence_sampler import EvidenceSampler
from pyro_ext.infer.evidence.evidence_state import EvidenceState
from pyro_ext.infer.evidence.particle_stream import ParticleStream
from pyro_ext.infer.evidence.proposals import WidenedScales, prior_proposal
from pyro_ext.tracing import Program
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs
from pyro_ext.tracing.shared_values import RowsOfPlate

NAME = "estimate_evidence"


@torch.no_grad()
def estimate_evidence(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
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

    :param model: an SVI, or the model, a callable with Pyro primitives.
    :param guide: the guide, likewise. None, or no guide, stands for the prior as proposal, which
        is plain Monte Carlo. Leave it out after an SVI.
    :param args: positional arguments of both.
    :param model_args: the same as a sequence, in place of ``args``.
    :param model_kwargs: keyword arguments of both whose names clash with those below.
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
    programs = read_programs(
        NAME, model, guide, args, kwargs, model_args, model_kwargs, without_guide=prior_proposal
    )
    if target_std_error is not None:
        check_real(NAME, "target_std_error", target_std_error, 0.0, math.inf)
    _check_blocks(data_plate, batch_size, data_loader)
    stream = ParticleStream(NAME, num_samples, chunk_size, 100, max_plate_nesting)
    orders = checked_orders(NAME, jackknife_orders, num_samples)
    check_positive(NAME, "proposal_scale", proposal_scale)
    if proposal_scale != 1:
        programs = replace(programs, guide=WidenedScales(proposal_scale)(programs.guide))
    is_kept = state is not None
    state = EvidenceState() if state is None else state
    state.check_settings(
        jackknife_orders=orders,
        proposal_scale=float(proposal_scale),
        data_plate=data_plate,
        batch_size=batch_size,
        has_data_loader=data_loader is not None,
    )
    blocks = iter([DataBlock(programs)])
    if data_loader is not None:
        blocks = blocks_of_loader(programs, data_loader, data_plate)
    elif batch_size is not None:
        rows = RowsOfPlate(str(data_plate), batch_size, state.num_rows)
        blocks = blocks_of_plate(programs, rows)
    with tqdm(desc=NAME, unit="draw", disable=not progress_bar) as bar:
        evidence = EvidenceSampler(stream, orders, target_std_error, state, is_kept, bar).run(
            blocks
        )
    warn_of_heavy_tails(
        NAME,
        evidence,
        "Widen the guide (proposal_scale=1.5) or train it further; more draws help slowly.",
    )
    return evidence


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
    if data_loader is not None:
        check_type(NAME, "data_loader", data_loader, Iterable, "an iterable of batches")
