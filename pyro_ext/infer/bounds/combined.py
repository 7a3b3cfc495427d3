from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_real
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import log_mean_exp


class CombinedELBO(MultiSampleELBO):
    r"""A convex combination of the ELBO and the importance-weighted bound (CIWAE).

    .. math::

        f(\log w_1, \dots, \log w_K) =
        \frac{\beta}{K} \sum_{k=1}^{K} \log w_k
        + (1 - \beta) \log \frac{1}{K} \sum_{k=1}^{K} w_k

    Its expectation is a lower bound of the log evidence.

    :param beta: the weight of the ELBO, ``0 <= beta <= 1``.
    :param num_particles: the number of particles K >= 1.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``beta`` is outside [0, 1], and in the cases of :class:`MultiSampleELBO`.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational Bounds
    are Not Necessarily Better.

    >>> CombinedELBO(beta=0.5, num_particles=3).bound(torch.tensor([0.0, 1.0, 2.0]))
    tensor(1.1545)
    """

    def __init__(self, beta: float = 0.5, num_particles: int = 2, **kwargs: Any) -> None:
        super().__init__(num_particles, **kwargs)
        check_real("CombinedELBO", "beta", beta, 0.0, 1.0)
        self.beta = beta

    @property
    def is_linear(self) -> bool:
        """Whether the bound is the mean of the log weights; see :class:`MultiSampleELBO`."""
        return super().is_linear or self.beta == 1

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        weights = torch.softmax(log_w, 0)
        first = self.beta / log_w.shape[0] + (1 - self.beta) * weights
        return first, (1 - self.beta) * weights * (1 - weights)
