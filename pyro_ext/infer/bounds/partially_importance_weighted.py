from typing import Any

from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.bounds.multiply_importance_weighted import MultiplyImportanceWeightedELBO


class PartiallyImportanceWeightedELBO(ImportanceWeightedELBO):
    r"""Trains the model by IWAE and the guide by MIWAE, on the same particles (PIWAE).

    The loss and the model's gradient are those of :class:`ImportanceWeightedELBO` with K particles;
    the guide's gradient is that of :class:`MultiplyImportanceWeightedELBO` with M groups of K / M,
    whose signal-to-noise ratio falls more slowly.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational Bounds
    are Not Necessarily Better.

    :param int num_particles: the number of all particles K.
    :param int num_groups: the number of groups M of the guide's bound, a divisor of K.
    :param kwargs: as for :class:`MultiSampleELBO`.
    :raises ValueError: if ``num_groups`` does not divide ``num_particles``; and as
        :class:`MultiSampleELBO` does.

    >>> import torch
    >>> elbo = PartiallyImportanceWeightedELBO(num_particles=4, num_groups=2)
    >>> log_w = torch.tensor([0.0, 1.0, 2.0, 3.0])
    >>> elbo.bound(log_w), elbo.guide_bound.bound(log_w)
    (tensor(2.0539), tensor(1.6201))
    """

    def __init__(self, num_particles: int = 2, num_groups: int = 1, **kwargs: Any) -> None:
        super().__init__(num_particles, **kwargs)
        self._guide_bound = MultiplyImportanceWeightedELBO(num_particles, num_groups)

    @property
    def guide_bound(self) -> MultiSampleELBO:
        """The bound with ``num_groups`` groups."""
        return self._guide_bound
