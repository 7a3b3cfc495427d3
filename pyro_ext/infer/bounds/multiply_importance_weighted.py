from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_integer
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import log_mean_exp


class MultiplyImportanceWeightedELBO(MultiSampleELBO):
    r"""The mean of M importance-weighted bounds with K / M particles each (MIWAE).

    .. math::

        f(\log w_1, \dots, \log w_K) =
        \frac{1}{M} \sum_{m=1}^{M} \log \frac{M}{K} \sum_{k=1}^{K/M} w_{mk}

    Its expectation is a lower bound of the log evidence. M = 1 gives the importance-weighted bound,
    and M = K gives the ELBO.

    :param num_particles: the total number of particles K >= 1.
    :param num_groups: the number of groups M >= 1, a divisor of K.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``num_groups`` does not divide ``num_particles``, and in the cases of
        :class:`MultiSampleELBO`.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational Bounds
    are Not Necessarily Better.

    >>> import torch
    >>> elbo = MultiplyImportanceWeightedELBO(num_particles=4, num_groups=2)
    >>> elbo.bound(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    tensor(1.6201)
    """

    def __init__(self, num_particles: int = 2, num_groups: int = 1, **kwargs: Any) -> None:
        super().__init__(num_particles, **kwargs)
        check_integer(type(self).__name__, "num_groups", num_groups, 1)
        if num_particles % num_groups:
            raise ValueError(
                f"{type(self).__name__}: num_groups must divide num_particles, but "
                f"num_groups={num_groups} with num_particles={num_particles}."
            )
        self.num_groups = num_groups

    @property
    def is_linear(self) -> bool:
        """Whether the bound is the mean of the log weights; see :class:`MultiSampleELBO`."""
        return super().is_linear or self.num_groups == self.num_particles

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return log_mean_exp(self._grouped(log_w), dim=1).mean(0)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        weights = self._grouped(log_w).softmax(1)
        first = weights / self.num_groups
        return first.reshape(log_w.shape), (first * (1 - weights)).reshape(log_w.shape)

    def _grouped(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "M L *common"]:
        if log_w.shape[0] % self.num_groups:
            raise ValueError(
                f"{type(self).__name__}: the number of log weights must be divisible by "
                f"num_groups={self.num_groups}, but log_w has shape {tuple(log_w.shape)}."
            )
        return log_w.unflatten(0, (self.num_groups, -1))
