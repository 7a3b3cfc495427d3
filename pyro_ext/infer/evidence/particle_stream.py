"""A stream of particles in chunks, none of which is kept."""

import math
from collections.abc import Sequence
from functools import partial

from pyro import poutine
from pyro.poutine import Trace

from pyro_ext._arguments import check_integer, check_nesting
from pyro_ext.infer.evidence.compiled_weights import CompiledWeights
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.proposals import raise_for_dependent_prior
from pyro_ext.tracing import Particles, ParticleTracer
from pyro_ext.tracing.advice import CHUNK_ADVICE
from pyro_ext.tracing.enumerated_draws import latent_draws
from pyro_ext.tracing.failures import (
    data_points,
    raise_not_finite,
    warn_of_points,
    warn_of_single_draws,
)
from pyro_ext.tracing.particle_plate import plated
from pyro_ext.tracing.shared_values import with_one_minibatch
from pyro_ext.tracing.sites import ParticleDimError


class ParticleStream:
    """A stream of the draws for an estimate by importance sampling.

    :param owner: the name of the estimate, for error messages.
    :param num_samples: the number of draws.
    :param chunk_size: the number of draws at once. With None, the default is used.
    :param default_chunk_size: the default, unless there are fewer draws.
    :param max_plate_nesting: the number of nested plates. With infinity, one run of model and guide
        finds it.

    :ivar graphs: the compiled graphs of the log weights; None to run the programs for each chunk.
    """

    def __init__(
        self,
        owner: str,
        num_samples: int,
        chunk_size: int | None,
        default_chunk_size: int,
        max_plate_nesting: float = math.inf,
    ) -> None:
        check_integer(owner, "num_samples", num_samples, 1)
        self._chooses_size = chunk_size is None
        if chunk_size is None:
            chunk_size = min(num_samples, default_chunk_size)
        check_integer(owner, "chunk_size", chunk_size, 1)
        check_nesting(owner, max_plate_nesting)
        self.owner = owner
        self.num_samples = num_samples
        self.chunk_size = chunk_size
        self._tracer = ParticleTracer(
            max_plate_nesting=max_plate_nesting, is_proposal=True, advice=CHUNK_ADVICE
        )
        self.graphs: CompiledWeights | None = None
        self._was_looked_at = False

    def draw_unread(self, block: DataBlock, num_particles: int) -> tuple[Particles, bool]:
        """Return a chunk of the draws, and whether its log weights may be NaN or infinite.

        Nothing has read their values then.
        """
        if self.graphs is None:
            is_first = not self._was_looked_at
            return self.draw(block, num_particles, reads=is_first), not is_first
        run = partial(self.draw, block, num_particles)
        return self.graphs.draw(block, num_particles, self._tracer, run)

    def draw(self, block: DataBlock, num_particles: int, reads: bool = True) -> Particles:
        """Return a chunk of the draws, after checks.

        :param block: the block of data, with model and guide.
        :param num_particles: the number of draws, which :meth:`run` may reduce to 1.
        :param reads: whether to check that no log weight is NaN or infinite.
        """
        particles = self.run(block, num_particles)
        if reads:
            self._check(particles, block)
        if not self._was_looked_at:
            raise_for_dependent_prior(self.owner, block.programs, particles)
            warn_of_points(particles.guide_traces[0], block.programs, block.subsamples)
            self._was_looked_at = True
        return particles

    def set_up(self, block: DataBlock) -> None:
        """Run model and guide once, so that they make their parameters and choose a minibatch."""
        self.run(block, min(2, self.chunk_size))

    def run(self, block: DataBlock, num_particles: int) -> Particles:
        """Return a number of particles for a block of data.

        If the programs cannot take several at once, and the user has not chosen a ``chunk_size``,
        it becomes 1, with a warning. The result then has a single particle.
        """
        try:
            return self._tracer.trace(block.programs, num_particles, block.subsamples)
        except ParticleDimError as error:
            if not self._chooses_size or self.chunk_size == 1:
                raise
            warn_of_single_draws(self.owner, error)
            self.chunk_size = 1
            return self.run(block, 1)

    def model_traces(self, particles: Particles, block: DataBlock) -> Sequence[Trace]:
        """Return the traces of the model, at draws of the sites that it sums out.

        :param particles: the particles.
        :param block: the block of data of these particles.
        """
        if not any(site.members for site in particles.density_sites[0]):
            return particles.model_traces
        programs = with_one_minibatch(block.programs, block.subsamples)
        num_particles = len(particles.log_w) // len(particles.model_traces)
        nesting = self._tracer.plate_nesting(block.programs)
        found = []
        for traces in zip(particles.guide_traces, particles.model_traces, strict=True):
            replayed = poutine.replay(programs.model, trace=latent_draws(*traces))
            handler = poutine.trace(plated(replayed, num_particles, nesting))
            found.append(handler.get_trace(*programs.args, **programs.kwargs))
        return found

    def _check(self, particles: Particles, block: DataBlock) -> None:
        log_w = particles.log_w
        if log_w.amax() < math.inf:  # False for NaN; one read of a value, not two
            return
        for is_bad, value in ((log_w.isnan(), math.nan), (log_w.isposinf(), math.inf)):
            if is_bad.any():
                where = data_points(is_bad.any(0), block.offset(particles.plates))
                raise_not_finite(f"{self.owner}: a log weight{where}", value, particles)
