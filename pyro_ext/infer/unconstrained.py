"""The latent sites of a guide as unconstrained tensors, and the densities as functions of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_ext.infer.data_blocks import DataBlock
from pyro_ext.infer.handlers import (
    PARTICLE_PLATE,
    SiteError,
    base_of,
    is_delta,
    is_masked_out,
)
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.particles import Layout, Particles
from pyro_ext.infer.plates import DensitySite, density_sites
from pyro_ext.infer.streaming import data_points, warn_of_points

CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class UnconstrainedSites(Messenger):
    """Gives the latent sites of a guide values from unconstrained tensors, or reads these off.

    :param str owner: the name of the algorithm, for errors.
    :param dict given: unconstrained values by site; None to record those of what is drawn.
    :param dict sample: values by site to take in place of draws, the same for all particles.

    :ivar dict positions: the unconstrained value of each site, if they are recorded.
    :ivar dict log_dets: the log determinant of the Jacobian from given values, for each site.
    """

    def __init__(
        self,
        owner: str,
        given: dict[str, Tensor] | None = None,
        sample: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.given = given
        self.sample = sample
        self.positions: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}
        self.particle_dim = 0
        self._of_guide: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        # A site that has a value is that of the guide again, replayed in the model.
        if msg["value"] is not None or not _is_latent(msg):
            return
        name = msg["name"]
        if is_masked_out(msg):
            raise SiteError(
                f"{self.owner}: expected latent sites with a density, got site '{name}', which is "
                "masked out. Remove it from the model and the guide."
            )
        self._of_guide.add(name)
        if self.given is not None:
            transform = self._transform(msg)
            msg["value"] = transform(self.given[name])
            msg["done"] = True
            self.log_dets[name] = transform.log_abs_det_jacobian(self.given[name], msg["value"])
        elif self.sample is not None and name in self.sample:
            msg["value"] = self.sample[name].expand(msg["fn"].batch_shape + msg["fn"].event_shape)
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if self.given is not None or name in self.positions or name not in self._of_guide:
            return
        self.positions[name] = self._transform(msg).inv(msg["value"])
        frames = {frame.name: frame.dim for frame in msg["cond_indep_stack"]}
        self.particle_dim = frames[PARTICLE_PLATE]

    def _transform(self, msg: Any) -> Any:
        support = msg["fn"].support
        try:
            # A circle is said to have the real line for support, on which its density is improper.
            if support.is_discrete or isinstance(base_of(msg["fn"]), CIRCULAR):
                raise NotImplementedError
            return biject_to(support)
        except NotImplementedError:
            raise SiteError(
                f"{self.owner}: expected continuous latent sites that map to unconstrained space, "
                f"got site '{msg['name']}', {msg['fn']}, with support {support}. Sum it out of the "
                "model, or use estimate_evidence."
            ) from None


def _is_latent(msg: Any) -> bool:
    return not (msg["is_observed"] or site_is_subsample(msg) or is_delta(msg["fn"]))


class Densities(NamedTuple):
    """Log-densities of the particles, each of shape ``(C, *common)``.

    :ivar log_p: log p(x, z).
    :ivar log_q: log q(z).
    :ivar log_det: the log determinant of the Jacobian from unconstrained to constrained values.
    """

    log_p: Tensor
    log_q: Tensor
    log_det: Tensor

    @property
    def log_w(self) -> Tensor:
        """log p - log q."""
        return self.log_p - self.log_q

    def annealed(self, beta: float) -> Tensor:
        """The log-density of p^beta q^(1 - beta) in unconstrained space."""
        return beta * self.log_p + (1 - beta) * self.log_q + self.log_det


class UnconstrainedPrograms:
    """A model and guide as functions of the unconstrained values of the guide's latent sites.

    Every site has its particles in the leftmost dim of its batch. The shapes are known after
    :meth:`draw`.

    :param str owner: the name of the algorithm, for errors.
    :param model: the model.
    :param guide: the guide.
    :param DataBlock block: what both run on.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    """

    def __init__(
        self,
        owner: str,
        model: Callable,
        guide: Callable,
        block: DataBlock,
        max_plate_nesting: float,
    ) -> None:
        self.owner = owner
        self.model = model
        self.guide = guide
        self.block = block
        self._elbo = ImportanceWeightedELBO(2, max_plate_nesting=max_plate_nesting)
        self._particle_dim = 0
        self.plates: tuple[Any, ...] = ()
        self.outer = 0.0

    @torch.no_grad()
    def draw(
        self, num_particles: int, sample: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Unconstrained values of two particles or more.

        :param dict sample: values of all latent sites, for all particles; None to draw them.
        """
        sites = UnconstrainedSites(self.owner, sample=sample)
        particles = self._trace(sites, num_particles)
        if not sites.positions:
            raise ValueError(
                f"{self.owner}: expected the guide to draw a latent site, got "
                f"{sorted(particles.guide_traces[0].nodes)}, none of which is random."
            )
        if sample is not None and sample.keys() != sites.positions.keys():
            raise ValueError(
                f"{self.owner}: expected exact_sample to hold the latent sites of the guide, "
                f"{sorted(sites.positions)}, got {sorted(sample)}."
            )
        warn_of_points(particles)
        self._particle_dim = sites.particle_dim
        self.plates = particles.plates
        self.outer = float(particles.outer)
        self._refuse_scales(particles)
        log_w = particles.log_w
        if log_w.isnan().any():
            where = data_points(log_w.isnan().any(0))
            raise ValueError(
                f"{self.owner}: expected finite log weights, got NaN{where} for draws of the guide."
            )
        return sites.positions

    def _refuse_scales(self, particles: Particles) -> None:
        """Raises if the guide's density is scaled, beyond what lies outside of the weights."""
        sites = density_sites("guide", particles.guide_traces[0])
        terms = [_log_prob(site) for site in sites]
        log_q = self.sum_out(terms, len(particles.log_q))
        if not torch.allclose(log_q, particles.log_q, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"{self.owner}: expected latent sites without poutine.scale, or one scale around "
                f"all of model and guide; among the guide's sites {[site.name for site in sites]} "
                "there is one with a scale of its own, with which q is no density."
            )

    def __call__(self, positions: dict[str, Tensor]) -> Densities:
        """The densities at some positions."""
        sites = UnconstrainedSites(self.owner, positions)
        num_particles = len(next(iter(positions.values())))
        # A proposal may lie so far out that a value overflows: it is then rejected.
        with pyro.validation_enabled(False):
            particles = self._trace(sites, num_particles)
        # Automatic guides transform a draw, and say by how much in a Delta.
        deltas = [
            -_log_prob(site)
            for site in density_sites("guide", particles.guide_traces[0])
            if is_delta(site.node["fn"])
        ]
        log_det = self.sum_out([*sites.log_dets.values(), *deltas], num_particles)
        return Densities(particles.log_p, particles.log_q, log_det)

    def sum_out(self, terms: list[Tensor], num_particles: int) -> Tensor:
        """The sum of terms with the batch dims of sites, of shape ``(C, *common)``."""
        dims = {self._particle_dim, *(plate.dim for plate in self.plates)}
        shape = torch.Size(plate.size for plate in self.plates)
        layout = Layout(num_particles, self._particle_dim, shape, dims, terms[0])
        return layout.stack([terms])

    def num_event_dims(self, position: Tensor) -> int:
        """The number of dims of a position to the right of its batch."""
        return position.dim() + self._particle_dim

    def expand(self, x: Tensor, position: Tensor) -> Tensor:
        """A tensor of shape ``(C, *common)`` or ``common`` with dims for a position's others."""
        shape = [1] * -self._particle_dim
        if x.dim() > len(self.plates):
            shape[0] = len(x)
        for plate in self.plates:
            shape[plate.dim] = plate.size
        return x.reshape(shape + [1] * self.num_event_dims(position))

    def _trace(self, sites: UnconstrainedSites, num_particles: int) -> Particles:
        block = self.block
        with sites:
            return self._elbo.trace_particles(
                self.model, self.guide, block.args, block.kwargs, block.subsamples, num_particles
            )


def _log_prob(site: DensitySite) -> Tensor:
    """The log-probability of a site, masked but not scaled."""
    log_prob = site.node["fn"].log_prob(site.node["value"])
    return scale_and_mask(log_prob, mask=site.node["mask"])
