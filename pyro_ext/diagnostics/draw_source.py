"""Draws of a guide, with all quantities that the model computes from them."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext._arguments import abbreviate, check_integer
from pyro_ext.diagnostics.free_model import free_model
from pyro_ext.diagnostics.site_arrays import (
    Groups,
    Predicate,
    Reading,
    SiteArray,
    has_density,
    is_deterministic,
    is_latent,
    is_observation,
    is_unmasked,
    joined,
    log_density,
    site_arrays,
)
from pyro_ext.diagnostics.summed_sites import has_data, log_likelihood, with_sums
from pyro_ext.tracing import Particles, ParticleTracer, Program, Programs
from pyro_ext.tracing.advice import CHUNK_ADVICE
from pyro_ext.tracing.density_sites import Plate
from pyro_ext.tracing.enumerated_draws import latent_draws
from pyro_ext.tracing.enumeration import is_enumerated
from pyro_ext.tracing.failures import warn_of_points, warn_of_single_draws
from pyro_ext.tracing.matching import raise_for_handlers_of_linear_objectives
from pyro_ext.tracing.particle_plate import plated
from pyro_ext.tracing.plate_sizes import set_plate_sizes
from pyro_ext.tracing.run import ParticleTraces
from pyro_ext.tracing.shared_values import RowsOfPlate, SharedGlobals, SharedSubsamples
from pyro_ext.tracing.sites import ParticleDimError, SiteError, is_delta, lies_in
from pyro_ext.tracing.user_scales import uniform_scale


class CannotDrawError(ValueError):
    """An error about a likelihood that has a density, but cannot be drawn from."""


class DrawSource:
    """A source of draws from a fitted model and guide.

    :param owner: the name of the calling function, for errors.
    :param programs: the model and guide.
    :param chunk_size: the number of draws at once.

    :ivar common: the names of the plates that enclose all random sites.
    :ivar local_plates: the names of other plates that hold both latent sites and data.
    :ivar row_plate: the subsampled plate; None if there is none.
    :ivar points: the names of the sites that the guide puts at one point.
    :ivar has_draws: whether the guide draws any site.
    :ivar drawn_plates: the names of the plates in which the guide draws sites, other than points.
    """

    @torch.no_grad()
    def __init__(self, owner: str, programs: Programs, chunk_size: int) -> None:
        self.owner = owner
        self.programs = programs
        self.chunk_size = chunk_size
        raise_for_handlers_of_linear_objectives()  # the importance weights are not linear
        self._tracer = ParticleTracer(is_linear=True, is_proposal=True, advice=CHUNK_ADVICE)
        self.nesting = self._tracer.plate_nesting(programs)
        self._constants: set[str] = set()
        self._data: dict[str, Tensor] = {}
        self._globals: dict[str, Tensor] = {}
        self.row_plate: Plate | None = None
        rows = SharedSubsamples()
        particles = self._tracer.trace(programs, min(2, chunk_size), rows)
        traces = self._tracer.run(programs, 3 if chunk_size > 1 else 1, rows)
        one, _ = self._at_draws(particles, min(2, chunk_size), rows)
        other, _ = self._at_draws(traces, traces.num_particles, rows)
        if chunk_size > 1:
            self._find_constants(one, other)
        self._varying = self._find_varying(one, other)
        self._check_given_rows(rows, particles)
        self.points = warn_of_points(particles.guide_traces[0], programs, rows)
        self.common = tuple(plate.name for plate in particles.plates)
        self._common_dims = [plate.dim for plate in particles.plates if plate.dim is not None]
        sites = particles.density_sites[0]
        self.summed_out = {
            member.name for s in sites for member in s.members if is_enumerated(member.node)
        }
        subsampled = {p.name: p for s in sites for p in s.plates if p.subsampling_scale != 1}
        if len(subsampled) > 1:
            first, second, *_ = sorted(subsampled)
            raise ValueError(
                f"{owner}: plates '{first}' and '{second}' are both subsampled. Subsample at most "
                "one plate."
            )
        self.row_plate = next(iter(subsampled.values()), None)
        if self.row_plate is not None and self.row_plate.dim is None:
            raise ValueError(
                f"{owner}: plate '{self.row_plate.name}' is subsampled and sequential. Make it a "
                "vectorised plate, or do not subsample it."
            )
        of_data = {p.name for s in sites if s.is_observed for p in s.plates}
        of_latents = {p.name for s in sites if not s.is_observed for p in s.plates}
        self.local_plates = tuple(sorted(of_data & of_latents - set(self.common)))
        drawn = [s for s in sites if s.program == "guide" and not s.is_observed]
        self.has_draws = bool(drawn)
        self.drawn_plates = {p.name for s in drawn for p in s.plates if not is_delta(s.node["fn"])}

    def draw(self, num_draws: int, *, predictive: bool) -> Groups:
        """Draw from the guide.

        :param num_draws: the number of draws.
        :param predictive: whether to draw observations as well.
        :returns: the groups ``posterior``, ``log_likelihood``, ``has_data`` (which elements of the
            log-likelihood are not masked out), ``observed_data``, ``is_unmasked``, ``log_p`` and
            ``log_q``, and also ``posterior_predictive`` if ``predictive`` is True.
        """
        return self._collect(num_draws, lambda n, rows: self._groups(n, rows, predictive))

    def draw_prior(self, num_draws: int) -> Groups:
        """Draw the groups ``prior`` and ``prior_predictive`` from the model alone."""

        def make(n: int, rows: SharedSubsamples) -> Groups:
            trace = self._run_model(free_model(self.programs.model), n, rows)
            return {
                "prior": self._arrays(trace, n, is_latent),
                "prior_predictive": self._arrays(trace, n, self._is_data),
            }

        return self._collect(num_draws, make)

    @torch.no_grad()
    def _collect(self, num_draws: int, make: Callable[[int, SharedSubsamples], Groups]) -> Groups:
        """Return the groups of all draws, chunk by chunk, and of all rows, block by block."""
        plate = self.row_plate.name if self.row_plate else ""
        chunks = []
        for start in range(0, num_draws, self.chunk_size):
            num = min(self.chunk_size, num_draws - start)
            blocks = list(self._blocks(partial(make, num)))
            chunks.append(
                {group: joined([block[group] for block in blocks], plate) for group in blocks[0]}
            )
        return {
            group: sites if group == "observed_data" else joined([c[group] for c in chunks])
            for group, sites in chunks[0].items()
        }

    def _find_constants(self, two: Any, three: Any) -> None:
        """Find the deterministic sites without the dim of the draws, by runs with 2 and 3."""
        for name, node in two.nodes.items():
            if node["type"] != "sample" or not is_deterministic(node):
                continue
            value, other = node["value"], three.nodes[name]["value"]
            if value.shape != other.shape:
                continue
            if not torch.equal(value, other):
                raise ValueError(
                    f"{self.owner}: deterministic site '{name}' mixes the draws: it has shape "
                    f"{tuple(value.shape)} for 2 and for 3 draws, without a dim of draws on the "
                    "left. Reduce over dims counted from the right, or pass chunk_size=1."
                )
            self._constants.add(name)

    def _find_varying(self, first: Any, other: Any) -> set[str]:
        """Return the observed sites whose values depend on the draws, and warn of them."""
        names = {
            name
            for name, node in first.nodes.items()
            if node["type"] == "sample"
            and is_observation(node)
            and name in other.nodes
            and not _is_same(node["value"], other.nodes[name]["value"])
        }
        if names:
            warnings.warn(
                f"{self.owner}: the values of the observed sites {abbreviate(sorted(names))} "
                "depend on the draws, so they are no data. Their log-likelihood counts, but they "
                "are left out of the observed data and of the predictions.",
                stacklevel=5,
            )
        return names

    def _is_data(self, node: Any) -> bool:
        return is_observation(node) and node["name"] not in self._varying

    def _blocks(self, make: Callable[[SharedSubsamples], Groups]) -> Iterator[Groups]:
        """Yield the groups of one chunk of draws, for one block of rows at a time."""
        self._data = {}
        self._globals = {}
        if self.row_plate is None:
            yield make(SharedSubsamples())
            return
        name, size = self.row_plate.name, self.row_plate.full_size
        rows = RowsOfPlate(name, self.row_plate.size, size)
        with SharedGlobals(name):
            while rows.first_row < size:
                groups = make(rows)
                num_new = min(rows.batch_size, size - rows.first_row)
                for sites in groups.values():
                    for site, array in sites.items():
                        if name in array.plates:
                            axis = 1 + array.plates.index(name)
                            new = array.values.take(range(-num_new, 0), axis)
                            sites[site] = SiteArray(array.plates, new)
                yield groups
                rows.first_row += rows.batch_size

    def _groups(self, num_draws: int, rows: SharedSubsamples, predictive: bool) -> Groups:
        traces: ParticleTraces = self._tracer.run(self.programs, num_draws, rows)
        (guide,), (row,) = traces.guide_traces, traces.density_sites
        model, drawn = self._at_draws(traces, num_draws, rows)
        sums = with_sums(traces.model_traces[0], row)
        self._check_rows(model)
        records = [traces.record(site) for site in row]
        density = partial(log_density, user_scale=uniform_scale(records, self._common_dims))
        groups = {
            "posterior": self._arrays(model, num_draws, is_latent)
            | self._arrays(guide, num_draws, partial(_is_own, model=model)),
            "log_likelihood": self._arrays(sums, num_draws, is_observation, log_likelihood),
            "observed_data": self._arrays(model, 1, self._is_data),
            "is_unmasked": self._arrays(model, num_draws, is_observation, is_unmasked),
            "has_data": self._arrays(sums, num_draws, is_observation, has_data),
            "log_p": self._arrays(sums, num_draws, has_density, density),
            "log_q": self._arrays(guide, num_draws, has_density, density),
        }
        if predictive:
            free = self._run_model(free_model(self.programs.model), num_draws, rows, drawn)
            groups["posterior_predictive"] = self._arrays(free, num_draws, self._is_data)
        for name, array in groups["posterior"].items():
            if np.isnan(array.values).any():
                raise ValueError(
                    f"{self.owner}: site '{name}' has NaN draws, so the fit has diverged. Train "
                    "again, for example with a lower learning rate."
                )
        return groups

    def _check_given_rows(self, rows: SharedSubsamples, particles: Particles) -> None:
        """Raise a ValueError if the programs choose the rows of a subsampled plate themselves."""
        plates = {plate for row in particles.density_sites for s in row for plate in s.plates}
        for plate in plates:
            if plate.name in rows.given and plate.subsampling_scale != 1:
                raise ValueError(
                    f"{self.owner}: plate '{plate.name}' has {plate.size} of {plate.full_size} "
                    f"rows, because the programs pass it a subsample. Pass the arguments for all "
                    f"{plate.full_size} rows."
                )

    def _check_rows(self, trace: Any) -> None:
        """Raise a ValueError if a second block of rows has the same tensors as the first."""
        if self.row_plate is None:
            return
        name = self.row_plate.name
        data = {
            site: node["value"]
            for site, node in trace.nodes.items()
            if node["type"] == "sample" and is_observation(node) and lies_in(node, name)
        }
        before, self._data = self._data, data
        if before and all(data[site].data_ptr() == before[site].data_ptr() for site in data):
            raise ValueError(
                f"{self.owner}: plate '{name}' is subsampled, but site '{min(before)}' observes "
                "the same tensor for other rows. Use the indices that the plate yields, or pass "
                "all rows and no subsample_size."
            )

    def _at_draws(
        self, traces: ParticleTraces | Particles, num_draws: int, rows: SharedSubsamples
    ) -> tuple[Any, Any]:
        """Return the trace of the model at the draws of all latent sites, and these draws."""
        model = traces.model_traces[0]
        drawn = latent_draws(traces.guide_traces[0], model)
        discrete = [name for name in drawn.nodes if name not in traces.guide_traces[0].nodes]
        if not discrete:
            return model, drawn
        for name in discrete:
            node: Any = drawn.nodes[name]
            if self.row_plate is not None and not lies_in(node, self.row_plate.name):
                node["value"] = self._globals.setdefault(name, node["value"])
        found = self._run_model(self.programs.model, num_draws, rows, drawn)
        found.compute_log_prob()
        return found, drawn

    def _run_model(
        self, model: Program, num_draws: int, rows: SharedSubsamples, drawn: Any = None
    ) -> Any:
        """Return the trace of a model at given draws of its latent sites, or at its own."""
        if drawn is not None:
            model = poutine.replay(model, trace=drawn)
        handler = poutine.trace(plated(model, num_draws, self.nesting))
        try:
            with rows:
                trace = handler.get_trace(*self.programs.args, **self.programs.kwargs)
        except NotImplementedError as error:
            raise CannotDrawError(
                f"{self.owner}: the model cannot draw its observations "
                f"({str(error).splitlines()[0]}), so it has no predictions."
            ) from error
        set_plate_sizes(trace)
        return trace

    def _arrays(
        self, trace: Any, num_draws: int, is_wanted: Predicate, read: Reading | None = None
    ) -> dict[str, SiteArray]:
        return site_arrays(trace, num_draws, 1 + self.nesting, is_wanted, read, self._constants)


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal, also in their NaN."""
    return x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True)


def _is_own(node: Any, model: Any) -> bool:
    """Return whether a site of the guide is deterministic, and not in the model."""
    return is_deterministic(node) and node["name"] not in model.nodes


def draw_source(
    owner: str, programs: Programs, num_samples: int, chunk_size: int | None
) -> DrawSource:
    """Return a source of draws. This runs model and guide to inspect their sites.

    :param owner: the name of the calling function, for errors.
    :param programs: the model and guide.
    :param num_samples: the planned number of draws, >= 2.
    :param chunk_size: the number of draws at once, >= 1; None for all draws, but at most 100.
    :returns: the source.
    :raises ValueError: if the arguments do not fit the programs.
    """
    check_integer(owner, "num_samples", num_samples, 2)
    size = min(num_samples, 100) if chunk_size is None else chunk_size
    check_integer(owner, "chunk_size", size, 1)
    try:
        return DrawSource(owner, programs, size)
    except ParticleDimError as error:
        if chunk_size is not None:
            raise
        warn_of_single_draws(owner, error)
        return DrawSource(owner, programs, 1)
    except TypeError as error:
        raise ValueError(
            f"{owner}: the arguments do not fit the model and guide ({error}). You passed "
            f"{len(programs.args)} positional arguments and the keyword arguments "
            f"{sorted(programs.kwargs)}."
        ) from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, SiteError) or str(error).startswith(owner):
            raise
        error.add_note(
            f"{owner}: if model and guide cannot take several draws at once, pass chunk_size=1."
        )
        raise
