import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import SVI
from pyro.poutine import Trace
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._arguments import check_type
from pyro_ext._random_states import kept_random_states
from pyro_ext.distributed.joint_call import joint_call
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.expectation import Expectation, Mean, SelfNormalizedMean
from pyro_ext.infer.evidence.particle_stream import ParticleStream
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.ops import accumulation_dtype
from pyro_ext.tracing import Program
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.sites import PARTICLE_PLATE, is_masked_out

NAME = "estimate_expectation"


def estimate_expectation(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 10_000,
    chunk_size: int | None = None,
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> Expectation:
    r"""Estimate the mean of the value that a model returns, by importance sampling.

    .. math::

        \hat\mu = \frac{1}{S} \sum_s w_s f(z_s) \quad \text{or} \quad
        \hat\mu = \frac{\sum_s w_s f(z_s)}{\sum_s w_s}, \qquad w_s = \frac{p(x, z_s)}{q(z_s)}

    The draws come from the guide. The first formula is used if the model observes nothing. It is
    unbiased. The second formula is used if the model has observed or factor sites. It estimates the
    mean under the posterior.

    The mean of an indicator is a probability. The probability of a rare event is cheap to estimate
    if the guide draws the event often. Each draw has one weight for all sites together, also under
    plates. The first dim of the returned value must be the particle dim, so sum or average only
    over dims counted from the right. This does not apply with ``chunk_size=1``.

    Sites of the model that are marked for enumeration, and not in the guide, are summed out of the
    weights. The model then runs again, with draws of these sites given the others, for the values.

    An interrupt (Ctrl-C) ends the sampling after the current chunk, with a warning, and the result
    uses the draws so far. A second interrupt ends the call at once. A warning is given if a Pareto
    k is above 0.7. It is also given if all values were zero, because the error is then unknown.

    Under a process group of ``torch.distributed``, call the function with the same arguments on
    each rank. The processes divide the draws, and each returns the same result.

    :param model: a trained SVI, or the model: a callable with Pyro primitives. It returns a real
        tensor.
    :param guide: the guide. Leave it out after an SVI. If you pass no guide or None, the draws come
        from the prior, which is plain Monte Carlo.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_samples: the number of draws S >= 1.
    :param chunk_size: the number of draws at once, >= 1; by default all draws, but at most 1,000.
        Use 1 for programs that cannot take the extra dim of vectorised particles.
    :param progress_bar: whether to show a progress bar.
    :param max_plate_nesting: the number of nested plates, >= 0. With infinity, one run of model and
        guide finds it.
    :param kwargs: further keyword arguments of model and guide.
    :returns: an :class:`Expectation`.
    :raises TypeError: if an argument has the wrong type, or if the model does not return a real
        tensor.
    :raises ValueError: if an argument is out of range, if the SVI has not been trained, if the
        returned tensor lacks the particle dim, if values or weights are NaN or infinite, if all
        weights are zero, and in the cases of :class:`MultiSampleELBO`.

    Source: Owen (2013), Monte Carlo Theory, Methods and Examples, chapter 9.

    P(z > 5) of a standard normal, from draws around 5:

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     return (pyro.sample("z", dist.Normal(0.0, 1.0)) > 5).float()
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(5.0, 1.0))
    >>> pyro.set_rng_seed(0)
    >>> found = estimate_expectation(model, guide)
    >>> bool((found.value - 2.8665e-7).abs() < 4 * found.std_error)
    True
    """
    with joint_call(NAME) as call, torch.no_grad():
        stream = ParticleStream(NAME, num_samples, chunk_size, 1000, max_plate_nesting)
        programs = read_programs(
            NAME, model, guide, args, kwargs, model_args, model_kwargs, without_guide=PriorProposal
        )
        settings = {
            "num_samples": num_samples,
            "chunk_size": chunk_size,
            "max_plate_nesting": max_plate_nesting,
        }
        call.check_inputs(programs, settings)
        block = DataBlock(programs)
        if stream.chunk_size > 1:
            _check_particle_dim(stream, block)
        elif call.size > 1:
            stream.set_up(block)
        call.check_parameters(programs)
        call.use_own_random_numbers()
        estimate: Mean | SelfNormalizedMean | None = None
        done = 0
        bar = tqdm(
            total=num_samples, desc=NAME, unit="draw", disable=not progress_bar or call.rank > 0
        )
        try:
            with bar:
                while done < num_samples:
                    sizes = call.share(num_samples - done, stream.chunk_size)
                    for kind, log_w, value in call.parts(
                        _chunk(stream, block, size) for size in sizes
                    ):
                        estimate = estimate or kind(num_samples, value)
                        estimate.update(log_w, value)
                        done += len(log_w)
                        bar.update(len(log_w))
        except KeyboardInterrupt:
            if call.interrupts or estimate is None:  # a second interrupt, or nothing to keep
                raise
            warnings.warn(
                f"{NAME} was interrupted. The result uses {done} of {num_samples} draws.",
                stacklevel=2,
            )
        del bar  # here, because Python ignores an interrupt inside of a destructor
        assert estimate is not None  # there is at least one chunk
        return estimate.result()


def _chunk(
    stream: ParticleStream, block: DataBlock, num_particles: int
) -> tuple[type[Mean | SelfNormalizedMean], Tensor, Tensor]:
    """Return the kind of the estimate, with the log weights and values of a chunk of draws."""
    particles = stream.draw(block, num_particles)
    log_w, value = _weights_and_values(particles, _returned(stream.model_traces(particles, block)))
    return SelfNormalizedMean if _has_observations(particles) else Mean, log_w, value


def _check_particle_dim(stream: ParticleStream, block: DataBlock) -> None:
    """Raise a ValueError unless the first dim of the returned value is the particle dim."""
    shapes = []
    with kept_random_states():
        for size in (2, 3):
            particles = stream.run(block, size)
            shapes.append(_returned(stream.model_traces(particles, block))[0].shape)
            if stream.chunk_size == 1:
                return  # the programs cannot take several particles at once
    if [shape[:1] for shape in shapes] != [(2,), (3,)] or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"{NAME}: the first dim of the tensor that the model returns must be the dim of the "
            f"particles, but its shape is {tuple(shapes[0])} for 2 particles and "
            f"{tuple(shapes[1])} for 3. Reduce over single dims counted from the right, such as "
            ".sum(-1), or pass chunk_size=1."
        )


def _returned(traces: Iterable[Trace]) -> list[Tensor]:
    """Return the values that the model returned: one if vectorised, else one per particle."""
    returned: list[Any] = [trace.nodes["_RETURN"]["value"] for trace in traces]
    for value in returned:
        check_type(NAME, "the value that the model returns", value, Tensor, "a real tensor")
        if value.is_complex():
            raise TypeError(
                f"{NAME}: the model must return a real tensor, but its dtype is {value.dtype}."
            )
    return returned


def _weights_and_values(particles: Particles, returned: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return one log weight for each particle, and the values that the model returned.

    Both are in float64.
    """
    wide = accumulation_dtype(particles.log_w.device)
    log_w = particles.log_w.to(wide).reshape(len(particles.log_w), -1).sum(1)
    if len(returned) == len(log_w):  # the particles ran one after the other
        value = torch.stack(torch.broadcast_tensors(*returned))
    else:
        (value,) = returned
        for position in _filler_positions(particles, value.dim()):
            value = value.squeeze(position)
    value = value.to(wide)
    has_weight = ~log_w.isneginf().reshape(-1, *(1,) * (value.dim() - 1))
    if (has_weight & ~value.isfinite()).any():
        raise ValueError(
            f"{NAME}: the model returned NaN or infinity for a draw whose weight is not zero. "
            "Return finite values."
        )
    return log_w, value


def _filler_positions(particles: Particles, num_dims: int) -> list[int]:
    """Return the positions of the batch dims that belong to no plate, in descending order.

    Only dims to the right of the particle dim count.
    """
    site: Any
    dims: dict[str, int] = {}
    for trace in (*particles.guide_traces, *particles.model_traces):
        for _, site in trace.iter_stochastic_nodes():
            dims |= {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    particle_dim = dims.get(PARTICLE_PLATE, -1)
    fillers = [dim - particle_dim for dim in range(particle_dim + 1, 0) if dim not in dims.values()]
    return sorted((position for position in fillers if position < num_dims), reverse=True)


def _has_observations(particles: Particles) -> bool:
    nodes: Any = particles.model_traces[0].nodes.values()
    return any(
        node["type"] == "sample" and node["is_observed"] and not is_masked_out(node)
        for node in nodes
    )
