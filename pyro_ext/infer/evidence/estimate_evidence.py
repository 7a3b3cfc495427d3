import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.infer import SVI
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer, check_positive, check_real, check_type
from pyro_ext.distributed.joint_call import JointCall, joint_call
from pyro_ext.infer.evidence.checks import checked_orders, warn_of_heavy_tails
from pyro_ext.infer.evidence.compiled_weights import compiled_weights
from pyro_ext.infer.evidence.data_blocks import DataBlock, blocks_of_loader, blocks_of_plate
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.infer.evidence.evidence_sampler import EvidenceSampler
from pyro_ext.infer.evidence.evidence_state import EvidenceState
from pyro_ext.infer.evidence.own_batches import own_batches
from pyro_ext.infer.evidence.particle_stream import ParticleStream
from pyro_ext.infer.evidence.proposals import PriorProposal, WidenedScales
from pyro_ext.infer.evidence.row_count import RowCount
from pyro_ext.infer.evidence.used_values import UsedValues
from pyro_ext.tracing import Program, Programs
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs
from pyro_ext.tracing.shared_values import RowsOfPlate

NAME = "estimate_evidence"
_ADVICE = "Widen the guide (proposal_scale=1.5) or train it further. More draws help only slowly."


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
    num_rows: int | None = None,
    state: EvidenceState | None = None,
    progress_bar: bool = False,
    compile: bool | str = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> Evidence:
    r"""Estimate the log evidence by importance sampling, with the guide as proposal.

    .. math::

        \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^{S} w_s, \qquad
        \mathrm{SE} = \sqrt{\frac{1}{S} \Bigl( \frac{\overline{w^2}}{\bar w^2} - 1 \Bigr)}, \qquad
        \mathrm{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}

    No gradients are computed. Model and guide run for ``chunk_size`` draws at once. The weights are
    added to running statistics in float64, so memory hardly grows with S. With ``batch_size`` or
    ``data_loader``, only the results grow with the number of data points. A different
    ``chunk_size`` or ``batch_size`` gives different draws, even with the same seed, because the
    random numbers are drawn chunk by chunk. The result is the evidence of the data on which model
    and guide run. It does not include the subsampling scale. It does not include a user's scale
    either, if this scale is the same at every site. Sites that the guide observes do not count,
    because the guide does not draw them. Sites of the model that are marked for enumeration are
    summed out of the weights, unless the guide draws them.

    An interrupt (Ctrl-C) ends the sampling after the current chunk, with a warning, and the result
    uses the draws so far. A second interrupt ends the call at once. A warning is also given if a
    Pareto k is above 0.7.

    Under a process group of ``torch.distributed``, call the function with the same arguments on
    each rank. The processes divide the blocks, or the draws if there is only one block, and each
    returns the same result. With ``data_loader``, pass a loader over all rows. The processes check
    that they have the same settings, arguments and parameters. Of a large tensor, they compare a
    part of the entries.

    :param model: a trained SVI, or the model: a callable with Pyro primitives.
    :param guide: the guide. Leave it out after an SVI. If you pass no guide or None, the draws come
        from the prior, which is plain Monte Carlo.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_samples: the number of draws S >= 1.
    :param chunk_size: the number of draws at once, >= 1; by default all draws, but at most 100. If
        the programs cannot take the extra dim of vectorised draws, the default is 1, with a
        warning.
    :param jackknife_orders: the orders m of the jackknife estimates, ``0 <= m < S``.
    :param target_std_error: the standard error >= 0, in nats, at which to stop. Sampling stops once
        every data point (of the current block) has a standard error of at most this value, but not
        before 100 draws. With None, all ``num_samples`` draws are made.
    :param proposal_scale: the factor > 0 that multiplies the guide's scales. A factor above 1
        widens a guide whose tails are too light. Every guide site must belong to a location-scale
        family, like the sites of AutoNormal, AutoMultivariateNormal and other AutoContinuous
        guides.
    :param data_plate: the name of the plate whose rows are visited in blocks.
    :param batch_size: the number of rows at once, >= 1. Model and guide must use the indices that
        the plate yields, or ``pyro.subsample``. If the plate has a subsample size, this size must
        equal ``batch_size``. Every row counts once in the result. Pass ``create_plates`` to
        automatic guides. The plate that it creates must not have a subsample size.
    :param data_loader: an iterable of batches on which to run model and guide. If a batch is a
        tensor, or a tuple or list of tensors, it is passed as the first positional arguments,
        before ``args``. If it is a dict, it is passed as keyword arguments. If there are several
        common plates, ``data_plate`` names the plate of the rows.
    :param num_rows: the number of rows >= 1 that the batches of ``data_loader`` must have in all.
        With None, it is the size of the plate if the model gives one, as in
        ``pyro.plate("data", 1000, subsample=x)``. Pass it if the batches are other rows than those
        of training. More rows raise an error, because a row may have come twice. Fewer rows give a
        warning with None, and an error otherwise.
    :param state: the state from which to continue. The call updates it, so that a later call can
        continue from there. It must belong to the same data, model and guide; see
        :class:`EvidenceState`. With None, the run starts from nothing and is not stored.
    :param progress_bar: whether to show a progress bar.
    :param compile: whether to compute the log weights of a chunk by one compiled graph, under the
        contract of :class:`CompiledSVI`. Equal seeds give the same draws, and the same results up
        to rounding. Compiling takes seconds, at the second chunk with the same shapes. Model and
        guide still run for the first chunk of a call, in audits, and with one warning if they
        cannot be captured. The graphs of the last four models are kept for later calls.
        ``"eager"`` makes graphs and does not compile them.
    :param max_plate_nesting: the number of nested plates, >= 0. With infinity, one run of model and
        guide finds it.
    :param kwargs: further keyword arguments of model and guide.
    :returns: an :class:`Evidence`. If a plate is subsampled and neither ``batch_size`` nor
        ``data_loader`` is given, this is the evidence of one minibatch.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range or does not fit the others, if the SVI has
        not been trained, if ``state`` belongs to other data or to another model, if the batches
        have the wrong number of rows, if log weights are NaN or positive infinity, if all weights
        of a data point are zero, if a site has no scale to multiply, and in the cases of
        :class:`MultiSampleELBO`.

    Sources: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders; Owen (2013),
    Monte Carlo Theory, Methods and Examples, chapter 9; Nowozin (2018), Debiasing Evidence
    Approximations.

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
    with joint_call(NAME) as call, torch.no_grad():
        _check_arguments(target_std_error, data_plate, batch_size, data_loader, num_rows, state)
        check_positive(NAME, "proposal_scale", proposal_scale)
        stream = ParticleStream(NAME, num_samples, chunk_size, 100, max_plate_nesting)
        orders = checked_orders(NAME, jackknife_orders, num_samples)
        used = None if state is None else UsedValues(state)
        state = EvidenceState() if state is None else state
        programs = read_programs(
            NAME, model, guide, args, kwargs, model_args, model_kwargs, without_guide=PriorProposal
        )
        graphs = compiled_weights(NAME, compile, programs, max_plate_nesting, proposal_scale)
        if proposal_scale != 1:
            programs = replace(programs, guide=WidenedScales(proposal_scale)(programs.guide))
        settings = {
            "num_samples": num_samples,
            "chunk_size": chunk_size,
            "jackknife_orders": orders,
            "target_std_error": target_std_error,
            "proposal_scale": float(proposal_scale),
            "data_plate": data_plate,
            "batch_size": batch_size,
            "has_data_loader": data_loader is not None,
            "num_rows": num_rows,
            "has_state": used is not None,
            "max_plate_nesting": max_plate_nesting,
        }
        call.check_inputs(programs, settings, state=state.progress)
        state.check_settings(settings)
        blocks, first = _blocks(call, programs, data_plate, batch_size, state.num_rows, data_loader)
        count = RowCount(NAME, num_rows)
        bar = tqdm(desc=NAME, unit="draw", disable=not progress_bar or call.rank > 0)
        with bar, graphs as stream.graphs:
            evidence = EvidenceSampler(
                stream, orders, target_std_error, state, used, count, call, bar
            ).run(blocks, first)
        del bar  # here, because Python ignores an interrupt inside of a destructor
    warn_of_heavy_tails(NAME, evidence, _ADVICE)
    return evidence


def _blocks(
    call: JointCall,
    programs: Programs,
    data_plate: str | None,
    batch_size: int | None,
    size: int | None,
    data_loader: Iterable[Any] | None,
) -> tuple[Iterator[DataBlock], DataBlock | None]:
    """Return the blocks of this process, and a block with which it can set up model and guide."""
    if data_loader is not None:
        batches = own_batches(call, data_loader)
        blocks = blocks_of_loader(programs, batches, data_loader, data_plate)
        loaded = list(itertools.islice(blocks, call.size > 1))
        return itertools.chain(loaded, blocks), next(iter(loaded), None)
    if batch_size is not None:
        rows = RowsOfPlate(str(data_plate), batch_size, size)
        first = DataBlock(programs, rows, rows.plate, is_whole=False)
        return blocks_of_plate(programs, rows, call.rank, call.size), first
    whole = DataBlock(programs)
    return iter([whole]), whole


def _check_arguments(
    target_std_error: float | None,
    data_plate: str | None,
    batch_size: int | None,
    data_loader: Iterable[Any] | None,
    num_rows: int | None,
    state: EvidenceState | None,
) -> None:
    if target_std_error is not None:
        check_real(NAME, "target_std_error", target_std_error, 0.0, math.inf)
    if state is not None:
        hint = "an EvidenceState, such as the result of EvidenceState.load(path)"
        check_type(NAME, "state", state, EvidenceState, hint)
    if num_rows is not None:
        check_integer(NAME, "num_rows", num_rows, 1)
        if data_loader is None:
            raise ValueError(
                f"{NAME}: num_rows={num_rows} needs data_loader, because it is the number of rows "
                "in all batches. Leave it out."
            )
    if batch_size is not None:
        check_integer(NAME, "batch_size", batch_size, 1)
        if data_loader is not None:
            raise ValueError(
                f"{NAME}: batch_size={batch_size} and data_loader were both given. Leave out "
                "batch_size, because the batches of a loader have a size of their own."
            )
        if data_plate is None:
            raise ValueError(
                f"{NAME}: batch_size={batch_size} needs data_plate. Pass the name of the plate "
                "whose rows to visit in blocks."
            )
    elif data_plate is not None and data_loader is None:
        raise ValueError(
            f"{NAME}: data_plate={data_plate!r} needs batch_size or data_loader. Pass one of them."
        )
    if data_loader is not None:
        check_type(NAME, "data_loader", data_loader, Iterable, "an iterable of batches")
