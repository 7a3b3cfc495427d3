"""The scale of the positions, by which Hamiltonian Monte Carlo takes its steps."""

import torch
from torch import Tensor

#: The largest number of coordinates D for which covariances are used.
MAX_DENSE = 256


class Metric:
    """A linear map from coordinates of unit scale to positions.

    :param center: the mean of the positions, of shape ``(*common, D)``.
    :param scale: standard deviations of shape ``(*common, D)``, or the Cholesky factors of
        covariances, of shape ``(*common, D, D)``.
    :param is_dense: whether ``scale`` holds Cholesky factors.
    """

    def __init__(self, center: Tensor, scale: Tensor, is_dense: bool = False) -> None:
        self.center = center
        self.scale = scale
        self.is_dense = is_dense

    @classmethod
    def of_spread(cls, positions: Tensor) -> "Metric":
        """Return the metric of the standard deviations of some particles.

        :param positions: the positions, of shape ``(C, *common, D)``. With fewer than 8 particles,
            all deviations are one.
        """
        if len(positions) < 8:
            return cls(positions.mean(0), torch.ones_like(positions[0]))
        return cls(positions.mean(0), _positive(positions.std(0)))

    @classmethod
    def of_cloud(cls, positions: Tensor, weights: Tensor) -> "Metric":
        """Return the metric of weighted particles.

        With few particles, or many coordinates, it holds no covariances.

        :param positions: the positions, of shape ``(C, *common, D)``.
        :param weights: the normalised weights, of shape ``(C, *common)``.
        """
        weights = weights.to(positions.dtype).unsqueeze(-1)
        center = (weights * positions).sum(0)
        centred = positions - center
        spread = _positive((weights * centred.square()).sum(0).sqrt())
        size, num_coordinates = len(positions), positions.shape[-1]
        # The weights count for fewer particles than there are.
        if num_coordinates > min(MAX_DENSE, size // 5):
            return cls(center, spread)
        unit = centred / spread
        correlation = torch.einsum("c...i,c...j->...ij", weights * unit, unit)
        shrinkage = num_coordinates / (num_coordinates + size)
        identity = torch.eye(num_coordinates, dtype=unit.dtype, device=unit.device)
        correlation = correlation + shrinkage * (identity - correlation)
        factor, info = torch.linalg.cholesky_ex(correlation)
        factor = torch.where((info == 0)[..., None, None], factor, identity)
        return cls(center, spread.unsqueeze(-1) * factor, is_dense=True)

    def to_unit(self, positions: Tensor) -> Tensor:
        """Return the coordinates of positions, with mean 0 and unit scale."""
        centred = positions - self.center
        if self.is_dense:
            found = torch.linalg.solve_triangular(self.scale, centred.unsqueeze(-1), upper=False)
            return found.squeeze(-1)
        return centred / self.scale

    def to_positions(self, momenta: Tensor) -> Tensor:
        """Return the change of positions for momenta of unit scale."""
        if self.is_dense:
            return (self.scale @ momenta.unsqueeze(-1)).squeeze(-1)
        return self.scale * momenta

    def to_momenta(self, slopes: Tensor) -> Tensor:
        """Return the change of momenta of unit scale for gradients."""
        if self.is_dense:
            return (self.scale.mT @ slopes.unsqueeze(-1)).squeeze(-1)
        return self.scale * slopes


def _positive(spread: Tensor) -> Tensor:
    return spread.where(spread.isfinite() & (spread > 0), 1.0)
