"""Draws of a guide with all that the model makes of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.diagnostics.site_arrays import (
    Groups,
    SiteArray,
    has_density,
    is_deterministic,
    is_latent,
    is_observation,
    is_unmasked,
    log_density,
    log_prob,
    site_arrays,
    value_of_site,
)
from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.infer.data_blocks import RowsOfPlate
from pyro_ext.infer.handlers import SharedSubsamples, lies_in
from pyro_ext.infer.local_plate import ParticlePlate, SharedGlobals
from pyro_ext.infer.plates import DensitySite, Plate, density_sites, find_common_plates, plates_of
from pyro_ext.infer.streaming import warn_of_points
from pyro_ext.infer.tracing import ParticleTraces, run_particles


class DrawSource:
    """A fitted model and guide, to draw from.

    :param model: the model.
    :param guide: the guide.
    :param tuple args: positional arguments of both.
    :param dict kwargs: keyword arguments of both.
    :param int batch_size: how many draws run at once, vectorised unless it is 1.

    :ivar common: names of the plates around all that is random.
    :ivar local_plates: names of other plates that hold both latent sites and data.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int,
    ) -> None:
        self.model = model
        self.guide = guide
        self.args = args
        self.kwargs = kwargs
        self.batch_size = batch_size
        self.is_vectorized = batch_size > 1
        self.nesting = self._guess_plate_nesting()
        self._row_plate: Plate | None = None
        self.common: tuple[str, ...] = ()
        self.local_plates: tuple[str, ...] = ()
        self._constants: set[str] = set()
        self._data: dict[str, Tensor] = {}
        self._find_plates()

    def draw(self, num_draws: int, *, predictive: bool) -> Groups:
        """Draws from the guide.

        :param int num_draws: how many.
        :param bool predictive: whether to draw observations as well.
        :returns: the groups ``posterior``, ``log_likelihood``, ``observed_data``, ``log_p`` and
            ``log_q``, and ``posterior_predictive`` if asked for.
        """

        def batch(n: int) -> Groups:
            return self._merge(self._blocks(lambda rows: self._groups(n, rows, predictive)))

        return self._in_batches(num_draws, batch)

    def draw_prior(self, num_draws: int) -> Groups:
        """Draws from the model alone: the groups ``prior`` and ``prior_predictive``."""

        def of_rows(n: int, rows: SharedSubsamples) -> Groups:
            traces = [self._run_model(n, rows) for _ in self._runs(n)]
            return {
                "prior": self._arrays(traces, n, is_latent, value_of_site),
                "prior_predictive": self._arrays(traces, n, is_observation, value_of_site),
            }

        def batch(n: int) -> Groups:
            return self._merge(self._blocks(lambda rows: of_rows(n, rows)))

        return self._in_batches(num_draws, batch)

    def draw_predictions(
        self,
        posterior: dict[str, SiteArray],
        names: Collection[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, SiteArray]:
        """Observations for other arguments, one for each draw of the posterior.

        Latent sites in the plates of the data are drawn from the model, given the others: the
        posterior knows nothing of new rows.

        :param dict posterior: the draws.
        :param names: the sites that were observed.
        """
        with torch.no_grad(), poutine.block():
            probe = poutine.trace(poutine.uncondition(self.model)).get_trace(*args, **kwargs)
        nodes: dict[str, Any] = {
            name: node for name, node in probe.nodes.items() if node["type"] == "sample"
        }
        frames = [plate for node in nodes.values() for plate in plates_of(node)]
        nesting = max((-(plate.dim or 0) for plate in frames), default=0)
        of_data = {p.name for name in names if name in nodes for p in plates_of(nodes[name])}
        known = {
            name: array
            for name, array in posterior.items()
            if name in nodes
            and not is_deterministic(nodes[name])
            and not of_data.intersection(array.plates)
        }
        num_draws = len(next(iter(posterior.values())).values)

        def is_predicted(node: Any) -> bool:
            return node["name"] in names

        def batch(start: int, n: int) -> dict[str, SiteArray]:
            data = {}
            for name, array in known.items():
                sizes = {p.dim: p.size for p in plates_of(nodes[name]) if p.dim is not None}
                values = torch.as_tensor(array.values[start : start + n])
                event = values.shape[1 + len(array.plates) :]
                shape = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
                data[name] = values.reshape(n, *shape, *event).to(nodes[name]["value"].device)
            if self.is_vectorized:
                traces = [self._predict(data, n, nesting, args, kwargs)]
            else:
                rows = [{k: data[k][i] for k in data} for i in range(n)]
                traces = [self._predict(row, 1, nesting, args, kwargs) for row in rows]
            return self._arrays(traces, n, is_predicted, value_of_site, nesting)

        with torch.no_grad():
            size = max(2, self.batch_size) if self.is_vectorized else self.batch_size
            parts = [
                batch(start, min(size, num_draws - start)) for start in range(0, num_draws, size)
            ]
        return {
            name: SiteArray(array.plates, np.concatenate([part[name].values for part in parts]))
            for name, array in parts[0].items()
        }

    def _predict(
        self,
        data: dict[str, Tensor],
        num_draws: int,
        nesting: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        model: Any = poutine.condition(poutine.uncondition(self.model), data=data)
        if self.is_vectorized:
            model = ParticlePlate(num_draws, -nesting - 1, None)(model)
        return poutine.trace(model).get_trace(*args, **kwargs)

    def _in_batches(self, num_draws: int, batch: Callable[[int], Groups]) -> Groups:
        sizes = [self.batch_size] * (num_draws // self.batch_size)
        if rest := num_draws - sum(sizes):
            sizes.append(rest)
        with torch.no_grad():
            # One vectorised draw would lack the dim of the draws.
            parts = [batch(max(2, size) if self.is_vectorized else size) for size in sizes]
        joined: Groups = {}
        for group, sites in parts[0].items():
            if group == "observed_data":
                joined[group] = sites
                continue
            joined[group] = {
                name: SiteArray(
                    array.plates,
                    np.concatenate([part[group][name].values for part in parts])[:num_draws],
                )
                for name, array in sites.items()
            }
        return joined

    def _guess_plate_nesting(self) -> int:
        probe = ImportanceWeightedELBO(2, vectorize_particles=False)
        with torch.no_grad():
            probe._guess_max_plate_nesting(self.model, self.guide, self.args, self.kwargs)
        return int(probe.max_plate_nesting)

    @property
    def is_subsampled(self) -> bool:
        """Whether a plate is subsampled."""
        return self._row_plate is not None

    def _find_plates(self) -> None:
        """Finds out the plate that is subsampled, and those around all and around some latents."""
        with torch.no_grad():
            rows = SharedSubsamples()
            traces = self._run(2, rows)
            self._find_constants(traces, self._run(3, rows))
        warn_of_points(traces)
        sites = [
            site
            for program, run in (("model", traces.model_traces), ("guide", traces.guide_traces))
            for site in density_sites(program, run[0])
        ]
        subsampled = {p.name: p for s in sites for p in s.plates if p.subsampling_scale != 1}
        if len(subsampled) > 1:
            raise ValueError(f"expected at most one subsampled plate, got {sorted(subsampled)}.")
        self._row_plate = next(iter(subsampled.values()), None)
        if self._row_plate is not None and self._row_plate.dim is None:
            raise ValueError(
                f"plate '{self._row_plate.name}': expected a vectorised plate, or no subsampling, "
                "got a sequential one that is subsampled."
            )

        def depends(site: DensitySite) -> bool:
            return not self.is_vectorized or traces.depends_on_particle(site.program, site.name)

        self.common = tuple(plate.name for plate in find_common_plates(sites, depends))
        of_data = {p.name for s in sites if s.is_observed for p in s.plates}
        of_latents = {p.name for s in sites if not s.is_observed for p in s.plates}
        self.local_plates = tuple(sorted(of_data & of_latents - set(self.common)))

    def _find_constants(self, two: ParticleTraces, three: ParticleTraces) -> None:
        """Finds the deterministic sites without the dim of the draws, in runs of 2 and of 3."""
        if not self.is_vectorized:
            return
        for name, node in two.model_traces[0].nodes.items():
            if node["type"] != "sample" or not is_deterministic(node):
                continue
            value: Any = node["value"]
            other: Any = three.model_traces[0].nodes[name]["value"]
            if value.shape != other.shape:
                continue
            if not torch.equal(value, other):
                raise ValueError(
                    f"deterministic site '{name}': expected a value with the dim of the draws on "
                    f"the left, got shape {tuple(value.shape)} for 2 and for 3 draws, which it "
                    "mixes. Reduce over dims counted from the right, or pass batch_size=1."
                )
            self._constants.add(name)

    def _blocks(self, make: Callable[[SharedSubsamples], Groups]) -> Iterator[Groups]:
        """The groups of one batch of draws, for the rows of a subsampled plate block by block."""
        self._data = {}
        if self._row_plate is None:
            yield make(SharedSubsamples())
            return
        name, size = self._row_plate.name, self._row_plate.full_size
        rows = RowsOfPlate(name, self._row_plate.size, size)
        with SharedGlobals(name):
            while rows.first_row < size:
                groups = make(rows)
                num_new = min(rows.batch_size, size - rows.first_row)
                for sites in groups.values():
                    for site, array in sites.items():
                        if name in array.plates:
                            axis = 1 + array.plates.index(name)
                            length = array.values.shape[axis]
                            new = np.arange(length - num_new, length)
                            sites[site] = SiteArray(array.plates, array.values.take(new, axis))
                yield groups
                rows.first_row += rows.batch_size

    def _merge(self, blocks: Iterable[Groups]) -> Groups:
        first, *others = blocks
        name = self._row_plate.name if self._row_plate else ""
        for group, sites in first.items():
            for site, array in sites.items():
                if name in array.plates:
                    parts = [array.values, *(other[group][site].values for other in others)]
                    joined = np.concatenate(parts, 1 + array.plates.index(name))
                    sites[site] = SiteArray(array.plates, joined)
        return first

    def _groups(self, num_draws: int, rows: SharedSubsamples, predictive: bool) -> Groups:
        traces = self._run(num_draws, rows)
        models = traces.model_traces
        self._check_rows(models[0])
        groups = {
            "posterior": self._arrays(models, num_draws, is_latent, value_of_site),
            "log_likelihood": self._arrays(models, num_draws, is_observation, log_prob),
            "observed_data": self._arrays(models[:1], 1, is_observation, value_of_site),
            "is_unmasked": self._arrays(models, num_draws, is_observation, is_unmasked),
            "log_p": self._arrays(models, num_draws, has_density, log_density),
            "log_q": self._arrays(traces.guide_traces, num_draws, has_density, log_density),
        }
        if predictive:
            drawn = [self._run_model(num_draws, rows, guide) for guide in traces.guide_traces]
            arrays = self._arrays(drawn, num_draws, is_observation, value_of_site)
            groups["posterior_predictive"] = arrays
        for name, array in groups["posterior"].items():
            if np.isnan(array.values).any():
                raise ValueError(
                    f"expected draws without NaN, got NaN at site '{name}': the fit has diverged."
                )
        return groups

    def _check_rows(self, trace: Any) -> None:
        """Raises if a second block of rows comes with the very data of the first."""
        if self._row_plate is None:
            return
        name = self._row_plate.name
        data = {
            site: node["value"]
            for site, node in trace.nodes.items()
            if node["type"] == "sample" and is_observation(node) and lies_in(node, name)
        }
        before, self._data = self._data, data
        if before and all(data[site].data_ptr() == before[site].data_ptr() for site in data):
            raise ValueError(
                f"plate '{name}' is subsampled: expected observations that follow the indices it "
                f"yields, got the same tensor for other rows at {sorted(data)}. Use the indices, "
                "or pass all rows and no subsample_size."
            )

    def _runs(self, num_draws: int) -> range:
        return range(1 if self.is_vectorized else num_draws)

    def _run(self, num_draws: int, rows: SharedSubsamples) -> ParticleTraces:
        return run_particles(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            num_particles=num_draws,
            max_plate_nesting=self.nesting,
            vectorized=self.is_vectorized,
            subsamples=rows,
        )

    def _run_model(self, num_draws: int, rows: SharedSubsamples, guide_trace: Any = None) -> Any:
        """The trace of the model with nothing observed."""
        model: Any = poutine.uncondition(self.model)
        if guide_trace is not None:
            model = poutine.replay(model, trace=guide_trace)
        if self.is_vectorized:
            model = ParticlePlate(num_draws, -self.nesting - 1, None)(model)
        with rows:
            return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    def _arrays(
        self,
        traces: Sequence[Any],
        num_draws: int,
        is_wanted: Callable[[Any], bool],
        value_of: Callable[[Any], tuple[Tensor, int]],
        nesting: int | None = None,
    ) -> dict[str, SiteArray]:
        return site_arrays(
            traces,
            num_draws if self.is_vectorized else 1,
            1 + (self.nesting if nesting is None else nesting),
            is_wanted,
            value_of,
            self._constants,
        )
