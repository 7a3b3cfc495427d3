from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_integer
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import jackknife, jackknife_derivatives


class JackknifeELBO(MultiSampleELBO):
    r"""The jackknife estimate of the log evidence (JVI), with bias O(K^-(m+1)).

    .. math::

        f(\log w_1, \dots, \log w_K) = \sum_{j=0}^{m} c(K, m, j)\, \bar L_{K-j}, \qquad
        c(K, m, j) = \frac{(-1)^j (K - j)^m}{(m - j)!\, j!}

    Here :math:`\bar L_{K-j}` is the mean of the importance-weighted bound over all subsets of K - j
    particles.

    This estimate is not a bound: it may lie above the log evidence. Training can raise it by making
    the estimate worse instead of improving the model. With few particles, training with the
    jackknife diverges. With many particles, it is no better than training with the
    importance-weighted bound. For evaluation, the jackknife is better than the importance-weighted
    bound.

    :param num_particles: the number of particles K >= 1.
    :param order: the order m, ``0 <= m < K``. Order 0 is the importance-weighted bound. One
        evaluation costs O(K^m).
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``order`` is outside ``0..K-1`` (K = 1 needs ``order=0``), and in the
        cases of :class:`MultiSampleELBO`.
    :raises TooManySubsetsError: when the bound is evaluated, if there are more subsets of one size
        than :data:`pyro_ext.ops.MAX_SUBSETS`.

    Source: Nowozin (2018), Debiasing Evidence Approximations: On Importance-weighted Autoencoders
    and Jackknife Variational Inference.

    >>> import torch
    >>> JackknifeELBO(num_particles=3, order=2).bound(torch.tensor([0.0, 1.0, 2.0]))
    tensor(1.4918)
    """

    def __init__(self, num_particles: int = 2, order: int = 1, **kwargs: Any) -> None:
        super().__init__(num_particles, **kwargs)
        check_integer("JackknifeELBO", "order", order, 0)
        if order >= num_particles:
            raise ValueError(
                f"JackknifeELBO: order must be below num_particles, but order={order} with "
                f"num_particles={num_particles}."
            )
        self.order = order

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return jackknife(log_w, self.order)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        return jackknife_derivatives(log_w, self.order)
