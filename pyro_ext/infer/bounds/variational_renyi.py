from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_real
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import log_mean_exp


class VariationalRenyiELBO(MultiSampleELBO):
    r"""The VR-IWAE bound: between the ELBO and the importance-weighted bound.

    .. math::

        f(\log w_1, \dots, \log w_K) =
        \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^{K} w_k^{1 - \alpha}

    It is a lower bound in expectation. alpha = 0 is the importance-weighted bound, and as alpha
    goes to 1 it goes to the ELBO.

    Sources: Li and Turner (2016), Renyi Divergence Variational Inference; Daudel, Benton, Shi and
    Doucet (2023), Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders.

    :param float alpha: the order, ``0 <= alpha < 1``.
    :param int num_particles: the number of particles K.
    :param kwargs: as for :class:`MultiSampleELBO`.
    :raises ValueError: if ``alpha`` is outside of [0, 1); and as :class:`MultiSampleELBO` does.

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
        """In closed form; see :meth:`MultiSampleELBO.derivatives`."""
        weights = torch.softmax((1 - self.alpha) * log_w, 0)
        return weights, (1 - self.alpha) * weights * (1 - weights)
