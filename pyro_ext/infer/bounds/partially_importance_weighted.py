from typing import Any

from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.bounds.multiply_importance_weighted import MultiplyImportanceWeightedELBO


class PartiallyImportanceWeightedELBO(ImportanceWeightedELBO):
    """The IWAE bound for the model and the MIWAE bound for the guide, together (PIWAE).

    The loss and the model's gradient are those of :class:`ImportanceWeightedELBO` with K particles.
    The guide's gradient is that of :class:`MultiplyImportanceWeightedELBO`, with the same K
    particles split into M groups of K / M. As K grows, the signal-to-noise ratio of this gradient
    falls more slowly than that of the importance-weighted bound.

    :param num_particles: the total number of particles K >= 1.
    :param num_groups: the number of groups M >= 1 of the guide's bound, a divisor of K.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``num_groups`` does not divide ``num_particles``, and in the cases of
        :class:`MultiSampleELBO`.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational Bounds
    are Not Necessarily Better.

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
        """The bound with ``num_groups`` groups, which trains the guide."""
        return self._guide_bound
