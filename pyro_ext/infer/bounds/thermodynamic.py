from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import abbreviate, check_integer
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO


class ThermodynamicELBO(MultiSampleELBO):
    r"""The thermodynamic variational objective (TVO), a left Riemann sum along a path from q to p.

    .. math::

        f(\log w_1, \dots, \log w_K) =
        \sum_{i=0}^{I-1} (\beta_{i+1} - \beta_i) \sum_{k=1}^{K} v_k^{(i)} \log w_k, \qquad
        v^{(i)} = \mathrm{softmax}(\beta_i \log w)

    Here :math:`0 = \beta_0 < \dots < \beta_I = 1`. The integrand increases along the path, so the
    sum is a lower bound if the expectations are exact. In practice the weights are self-normalised
    over K particles. The sum is then a lower bound only in the limit of large K. One partition
    gives the ELBO.

    :param num_particles: the number of particles K >= 1.
    :param num_partitions: the number of partitions I >= 1; 2 by default. The inner betas are evenly
        spaced in their logarithm, and the first of them is 0.01.
    :param betas: the increasing sequence of betas from 0 to 1, instead of ``num_partitions``.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``betas`` do not increase from 0 to 1, if both ``betas`` and
        ``num_partitions`` are given, and in the cases of :class:`MultiSampleELBO`. A run also
        raises it if any weight is zero.

    Source: Masrani, Le and Wood (2019), The Thermodynamic Variational Objective.

    >>> ThermodynamicELBO(3, betas=[0.0, 0.5, 1.0]).bound(torch.tensor([0.0, 1.0, 2.0]))
    tensor(1.1601)
    """

    def __init__(
        self,
        num_particles: int = 2,
        num_partitions: int | None = None,
        betas: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, **kwargs)
        if betas is not None and num_partitions is not None:
            raise ValueError(
                "ThermodynamicELBO: num_partitions and betas were both given. Pass one of them."
            )
        if betas is None:
            partitions = 2 if num_partitions is None else num_partitions
            check_integer("ThermodynamicELBO", "num_partitions", partitions, 1)
            inner = range(1, partitions)
            betas = [0.0, *(0.01 ** (1 - (i - 1) / (partitions - 1)) for i in inner), 1.0]
        self.betas = tuple(float(beta) for beta in betas)
        rises = all(a < b for a, b in zip(self.betas, self.betas[1:], strict=False))
        if len(self.betas) < 2 or self.betas[0] != 0 or self.betas[-1] != 1 or not rises:
            raise ValueError(
                "ThermodynamicELBO: betas must increase from 0 to 1, but they are "
                f"{abbreviate(self.betas)}."
            )

    @property
    def is_linear(self) -> bool:
        """Whether the bound is the mean of the log weights; see :class:`MultiSampleELBO`."""
        return super().is_linear or len(self.betas) == 2

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        means = [width * (v * log_w).sum(0) for _, width, v in self._partitions(log_w)]
        return torch.stack(means).sum(0)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        first, second = torch.zeros_like(log_w), torch.zeros_like(log_w)
        for beta, width, v in self._partitions(log_w):
            deviation = log_w - (v * log_w).sum(0)
            slope = v * (1 + beta * deviation)
            first = first + width * slope
            second = second + width * beta * v * ((1 - v) * (1 + beta * deviation) + 1 - slope)
        return first, second

    def _partitions(self, log_w: Tensor) -> list[tuple[float, float, Tensor]]:
        """Return the left end, the width and the normalised weights of each partition."""
        return [
            (beta, after - beta, torch.softmax(beta * log_w, 0))
            for beta, after in zip(self.betas, self.betas[1:], strict=False)
        ]
