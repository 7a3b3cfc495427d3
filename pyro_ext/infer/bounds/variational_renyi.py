from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_real
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import log_mean_exp


class VariationalRenyiELBO(MultiSampleELBO):
    r"""The VR-IWAE bound, between the ELBO and the importance-weighted bound.

    .. math::

        f(\log w_1, \dots, \log w_K) =
        \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^{K} w_k^{1 - \alpha}

    Its expectation is a lower bound of the log evidence. alpha = 0 gives the importance-weighted
    bound. As alpha approaches 1, the bound approaches the ELBO.

    :param alpha: the order, ``0 <= alpha < 1``.
    :param num_particles: the number of particles K >= 1.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``alpha`` is outside [0, 1), and in the cases of
        :class:`MultiSampleELBO`.

    Sources: Li and Turner (2016), Renyi Divergence Variational Inference; Daudel, Benton, Shi and
    Doucet (2023), Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders.

    >>> VariationalRenyiELBO(alpha=0.5, num_particles=3).bound(torch.tensor([0.0, 1.0, 2.0]))
    tensor(1.1633)
    """

    def __init__(self, alpha: float = 0.5, num_particles: int = 2, **kwargs: Any) -> None:
        super().__init__(num_particles, **kwargs)
        check_real("VariationalRenyiELBO", "alpha", alpha, 0.0, 1.0)
        if alpha == 1:
            raise ValueError(
                "VariationalRenyiELBO: alpha must be below 1. For alpha = 1, use "
                "pyro.infer.Trace_ELBO."
            )
        self.alpha = alpha

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return log_mean_exp((1 - self.alpha) * log_w) / (1 - self.alpha)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        weights = torch.softmax((1 - self.alpha) * log_w, 0)
        return weights, (1 - self.alpha) * weights * (1 - weights)
