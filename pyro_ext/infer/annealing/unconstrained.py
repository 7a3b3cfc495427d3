"""The densities as functions of unconstrained tensors, one for each latent site of a guide."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._arguments import abbreviate, check_nesting
from pyro_ext.infer.annealing.unconstrained_sites import UnconstrainedSites, check_sample
from pyro_ext.infer.evidence.proposals import raise_for_dependent_prior
from pyro_ext.tracing import Particles, ParticleTracer, Programs
from pyro_ext.tracing.advice import CHUNK_ADVICE
from pyro_ext.tracing.density_sites import DensitySite, density_sites
from pyro_ext.tracing.enumeration import is_enumerated
from pyro_ext.tracing.failures import data_points, raise_not_finite, warn_of_points
from pyro_ext.tracing.layout import Layout
from pyro_ext.tracing.shared_values import SharedSubsamples
from pyro_ext.tracing.site_values import with_plates
from pyro_ext.tracing.sites import SiteError, is_delta

#: The share of draws at an edge of a support that is never a reason for a warning.
MAX_ROUNDED = 0.01
_ADVICE = replace(CHUNK_ADVICE, one_at_a_time="use estimate_evidence with chunk_size=1")


class SingularDrawError(ValueError):
    """An error about a draw of the guide at which a matrix of the programs is singular."""


class Densities(NamedTuple):
    """Log densities of the particles, each of shape ``(C, *common)``.

    :ivar log_p: log p(x, z).
    :ivar log_q: log q(z).
    :ivar log_det: the log determinant of the Jacobian from unconstrained to constrained values.
    """

    log_p: Tensor
    log_q: Tensor
    log_det: Tensor

    @property
    def log_w(self) -> Tensor:
        """The log weights log p - log q."""
        return self.log_p - self.log_q

    def annealed(self, beta: float | Tensor) -> Tensor:
        """Return the log density of p^beta q^(1 - beta) in unconstrained space."""
        return beta * self.log_p + (1 - beta) * self.log_q + self.log_det


class UnconstrainedPrograms:
    """A model and a guide as functions of unconstrained values of the guide's latent sites.

    Every site has its particles in the leftmost dim of its batch. The shapes are known after
    :meth:`draw`.

    :ivar particle_dim: the dim of the particles, counted from the right of a site's batch.
    :ivar plates: the common plates.
    :ivar outer: the sum of the terms outside of the common plates.

    :param owner: the name of the algorithm, for error messages.
    :param programs: the model and guide.
    :param max_plate_nesting: the number of nested plates. With infinity, one run of model and guide
        finds it.
    """

    def __init__(self, owner: str, programs: Programs, max_plate_nesting: float) -> None:
        check_nesting(owner, max_plate_nesting)
        self.owner = owner
        self.programs = programs
        self._subsamples = SharedSubsamples()
        self._warned: set[str] = set()
        self._tracer = ParticleTracer(
            max_plate_nesting=max_plate_nesting,
            has_dim_for_one=True,
            is_proposal=True,
            has_loose_weights=False,
            advice=_ADVICE,
        )
        self.particle_dim = 0
        self.plates: tuple[Any, ...] = ()
        self.outer = 0.0

    def with_arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "UnconstrainedPrograms":
        """Return the same functions for other arguments of model and guide, of equal shapes."""
        other = copy.copy(self)
        other.programs = replace(self.programs, args=tuple(args), kwargs=kwargs)
        return other

    @torch.no_grad()
    def draw(
        self, num_particles: int, sample: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the unconstrained values of some particles.

        :param num_particles: the number of particles.
        :param sample: values of all latent sites, to use for all particles; None to draw them.
        :raises SingularDrawError: if a matrix of model or guide is singular at a draw.
        :raises ValueError: if the guide has no latent site, if ``sample`` does not fit its sites or
            has density zero, if the guide has a scale of its own, or if a log weight is NaN.
        """
        if sample is not None:
            check_sample(self.owner, sample)
        sites = UnconstrainedSites(self.owner, sample=sample)
        try:
            particles = self._trace(sites, num_particles)
        except Exception as error:
            cause = error.__cause__ or error
            is_singular = isinstance(cause, torch.linalg.LinAlgError)
            if not is_singular and "PositiveDefinite" not in str(cause):
                raise
            raise SingularDrawError(
                f"{self.owner}: a matrix is singular at one of {num_particles} draws of the guide, "
                "or without a guide of the prior. Add a larger number to its diagonal, or use "
                f"torch.float64.\n{type(cause).__name__}: {str(cause).splitlines()[0]}"
            ) from error
        if not sites.positions:
            raise ValueError(
                f"{self.owner}: the guide draws no latent site, or only points (Delta). Use a "
                "guide that samples at least one site."
            )
        if sample is not None and sample.keys() != sites.positions.keys():
            raise ValueError(
                f"{self.owner}: exact_sample must have the latent sites of the guide, "
                f"{abbreviate(sorted(sites.positions))}, but it has {abbreviate(sorted(sample))}. "
                "Without a guide, these are the latent sites of the model."
            )
        warn_of_points(particles.guide_traces[0], self.programs, self._subsamples)
        self._warn_of_rounding(sites.rounded)
        self.particle_dim = sites.particle_dim
        self.plates = particles.plates
        self.outer = particles.unscaled_outer
        self._raise_for_scales(particles)
        raise_for_dependent_prior(self.owner, self.programs, particles)
        if sample is not None:
            self._raise_for_zero(particles)
        if particles.log_w.isnan().any():
            where = data_points(particles.log_w.isnan().any(0))
            raise_not_finite(f"{self.owner}: a log weight{where}", math.nan, particles)
        return sites.positions

    def _warn_of_rounding(self, rounded: dict[str, float]) -> None:
        """Warn once of sites whose draws are too close to an edge for the dtype."""
        for name, share in rounded.items():
            if share > MAX_ROUNDED and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{self.owner}: {share:.0%} of the draws of site '{name}' are too close to the "
                    "edge of its support for its dtype, so the evidence may be biased. Use "
                    "torch.float64, or estimate_evidence, which does not move the draws.",
                    stacklevel=9,
                )

    def _raise_for_zero(self, particles: Particles) -> None:
        """Raise a ValueError if an exact sample has no density."""
        for log_prob, program, advice in (
            (particles.log_p, "model", "Pass a draw from the posterior of these data."),
            (particles.log_q, "guide", "The guide misses a part of the posterior. Widen it."),
        ):
            is_zero = ~log_prob.isfinite()
            if is_zero.any():
                where = data_points(is_zero.any(0))
                raise ValueError(
                    f"{self.owner}: exact_sample has density zero under the {program}{where}. "
                    f"{advice}"
                )

    def _raise_for_scales(self, particles: Particles) -> None:
        """Raise a ValueError if the guide has a scale that is part of the weights."""
        sites = density_sites("guide", particles.guide_traces[0])
        with _inverses(self.owner):
            terms = [_log_prob(site) for site in sites]
        log_q = self.sum_out(terms, len(particles.log_q))
        if not torch.allclose(log_q, particles.log_q, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"{self.owner}: one of the guide's sites {abbreviate(site.name for site in sites)} "
                "has a scale of its own, so q is not a density. Remove poutine.scale, or put one "
                "scale around all of model and guide."
            )

    def __call__(self, positions: dict[str, Tensor]) -> Densities:
        """Return the densities at the given positions."""
        sites = UnconstrainedSites(self.owner, positions)
        num_particles = len(next(iter(positions.values())))
        # A value may overflow at a distant proposal, which is then rejected.
        with pyro.validation_enabled(False), _inverses(self.owner):
            particles = self._trace(sites, num_particles)
        # Automatic guides transform a draw, and record the log determinant in a Delta.
        deltas = [
            -_log_prob(site)
            for site in density_sites("guide", particles.guide_traces[0])
            if is_delta(site.node["fn"])
        ]
        log_det = self.sum_out([*sites.log_dets.values(), *deltas], num_particles)
        return Densities(particles.log_p, particles.log_q, log_det)

    def values(self, positions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of the model's latent sites, of shape ``(C, *plates, *event)``."""
        num_particles = len(next(iter(positions.values())))
        particles = self._trace(UnconstrainedSites(self.owner, positions), num_particles)
        found = {}
        node: Any
        for name, node in particles.model_traces[0].nodes.items():
            if node["type"] != "sample" or node["is_observed"] or site_is_subsample(node):
                continue
            if is_enumerated(node):
                continue
            _, found[name] = with_plates(
                node, node["value"], node["fn"].event_dim, num_particles, -self.particle_dim
            )
        return found

    def sum_out(self, terms: list[Tensor], num_particles: int) -> Tensor:
        """Return the sum of terms with the batch dims of sites, of shape ``(C, *common)``."""
        dims = {self.particle_dim, *(plate.dim for plate in self.plates)}
        shape = torch.Size(plate.size for plate in self.plates)
        layout = Layout(num_particles, self.particle_dim, shape, dims, terms[0])
        return layout.stack([terms])

    def _trace(self, sites: UnconstrainedSites, num_particles: int) -> Particles:
        with sites:
            return self._tracer.trace(self.programs, num_particles, self._subsamples)


@contextmanager
def _inverses(owner: str) -> Iterator[None]:
    """Raise a SiteError where a transform of the guide has no inverse."""
    try:
        yield
    except KeyError as error:
        if "intermediates cache" not in str(error):
            raise
        raise SiteError(
            f"{owner}: the guide has a transform without an inverse, so its density at other "
            "values than its draws is unknown. Leave the guide out, use a transform with an "
            "inverse, or use estimate_evidence."
        ) from error


def _log_prob(site: DensitySite) -> Tensor:
    """Return the log-probability of a site, masked but not scaled."""
    log_prob = site.node["fn"].log_prob(site.node["value"])
    return scale_and_mask(log_prob, mask=site.node["mask"])
