"""The densities as functions of one tensor that holds all latent sites."""

import torch
from torch import Tensor

from pyro_ext.infer.annealing.compiled_slopes import Slopes
from pyro_ext.infer.annealing.slopes import densities_at, slopes_at
from pyro_ext.infer.annealing.unconstrained import Densities, UnconstrainedPrograms


class FlatTarget:
    """The densities at positions of shape ``(C, *common, D)``.

    The last dim holds the D unconstrained coordinates of all latent sites of one element of the
    common plates. The shapes are known after :meth:`draw`.

    :param programs: the densities as functions of one tensor a site.
    :param chunk_size: the number of particles at once; None for all.
    :param slopes: the function that computes gradients.
    """

    def __init__(
        self,
        programs: UnconstrainedPrograms,
        chunk_size: int | None = None,
        slopes: Slopes = slopes_at,
    ) -> None:
        self.programs = programs
        self._chunk_size = chunk_size
        self._slopes = slopes
        self._sites: dict[str, Tensor] = {}

    def draw(
        self, num_particles: int, sample: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Densities]:
        """Return the positions of draws from the guide, and the densities there.

        :param num_particles: the number C of particles.
        :param sample: values of all latent sites, to use for all particles; None to draw them.
        """
        size = self._chunk_size or num_particles
        found = []
        for start in range(0, num_particles, size):
            drawn = self.programs.draw(min(size, num_particles - start), sample)
            self._sites = {name: self._moved(x[:1]) for name, x in drawn.items()}
            found.append((self._flat(drawn), *densities_at(self.programs, drawn)))
        flat, *rest = map(torch.cat, zip(*found, strict=True))
        return flat, Densities(*rest)

    def densities(self, positions: Tensor) -> Densities:
        """Return the densities at some positions."""
        if self._slopes is not slopes_at:  # a graph with gradients is faster than the programs
            beta = positions.new_ones(positions.shape[1:-1])
            return self.slopes(positions, beta)[0]
        parts = positions.split(self._chunk_size or len(positions))
        found = [densities_at(self.programs, self.by_site(part)) for part in parts]
        return Densities(*map(torch.cat, zip(*found, strict=True)))

    def slopes(self, positions: Tensor, beta: float | Tensor) -> tuple[Densities, Tensor]:
        """Return the densities, and the gradient of the annealed density, at some positions.

        :param positions: the positions of C particles.
        :param beta: the inverse temperature, a number or a tensor of shape ``common``.
        """
        found = []
        for part in positions.split(self._chunk_size or len(positions)):
            densities, slopes = self._slopes(self.programs, self.by_site(part), beta)
            found.append((self._flat(slopes), *densities))
        flat, *rest = map(torch.cat, zip(*found, strict=True))
        return Densities(*rest), flat

    def values(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the values of the model's latent sites, of shape ``(C, *plates, *event)``."""
        parts = positions.split(self._chunk_size or len(positions))
        found = [self.programs.values(self.by_site(part)) for part in parts]
        return {name: torch.cat([values[name] for values in found]) for name in found[0]}

    def by_site(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the positions as a dict from site name to a tensor with the dims of the site."""
        sizes = [x[0].numel() // self._num_points for x in self._sites.values()]
        parts = positions.split(sizes, -1)
        num_plates = len(self.programs.plates)
        return {
            name: part.reshape(len(part), *x.shape[1:])
            .movedim(tuple(range(1, 1 + num_plates)), self._plate_dims)
            .to(x.dtype)
            for part, (name, x) in zip(parts, self._sites.items(), strict=True)
        }

    def _flat(self, positions: dict[str, Tensor]) -> Tensor:
        moved = [self._moved(x) for x in positions.values()]
        num_plates = len(self.programs.plates)
        return torch.cat([x.reshape(*x.shape[: 1 + num_plates], -1) for x in moved], -1)

    def _moved(self, x: Tensor) -> Tensor:
        """Return the tensor of a site with the common plates right of the particles."""
        return x.movedim(self._plate_dims, tuple(range(1, 1 + len(self.programs.plates))))

    @property
    def _plate_dims(self) -> tuple[int, ...]:
        return tuple(plate.dim - self.programs.particle_dim for plate in self.programs.plates)

    @property
    def _num_points(self) -> int:
        return torch.Size(plate.size for plate in self.programs.plates).numel()
