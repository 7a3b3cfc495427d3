from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_integer, describe
from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import jackknife, jackknife_derivatives

_GUIDES = "importance-weighted", "jackknife"
_WEIGHTS = "nonnegative", "published"


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

    With ``guide="importance-weighted"``, only the model is trained on the jackknife, and the guide
    on the importance-weighted bound. The gradient of the model is
    :math:`\sum_k g_k \nabla \log p(x, z_k)`. With ``weights="published"``, :math:`g_k` is

    .. math:: f_k = \frac{\partial f}{\partial \log w_k}

    Because :math:`\sum_k f_k = 1`, this is an estimate of :math:`\nabla \log p(x)` with bias
    O(K^-(m+1)). Where one weight dominates, :math:`f_k` is negative for other particles, and
    training lowers their density. With ``weights="nonnegative"``,

    .. math:: g_k = \frac{\max(f_k, 0)}{\sum_j \max(f_j, 0)}

    This is a weighted mean over particles. It equals :math:`f_k` where no :math:`f_j` is negative,
    and its bias is larger elsewhere. The :math:`g_k` are constants in the gradient.

    :param num_particles: the number of particles K >= 1.
    :param order: the order m, ``0 <= m < K``. Order 0 is the importance-weighted bound. One
        evaluation costs O(K^m).
    :param guide: the bound that trains the guide: ``"jackknife"`` or ``"importance-weighted"``.
    :param weights: the weights of the model's gradient: ``"published"`` or ``"nonnegative"``.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``order`` is outside ``0..K-1`` (K = 1 needs ``order=0``), if ``guide``
        or ``weights`` is unknown, and in the cases of :class:`MultiSampleELBO`.
    :raises TooManySubsetsError: when the bound is evaluated, if there are more subsets of one size
        than :data:`pyro_ext.ops.MAX_SUBSETS`.

    Source: Nowozin (2018), Debiasing Evidence Approximations: On Importance-weighted Autoencoders
    and Jackknife Variational Inference.

    >>> import torch
    >>> elbo = JackknifeELBO(num_particles=3, order=2, weights="nonnegative")
    >>> elbo.bound(torch.tensor([0.0, 1.0, 2.0]))
    tensor(1.4918)
    >>> elbo.derivatives(torch.tensor([0.0, 1.0, 3.0]))[0]
    tensor([-0.0661, -0.4531,  1.5192])
    >>> elbo.model_weights(torch.tensor([0.0, 1.0, 3.0]))
    tensor([0., 0., 1.])
    """

    def __init__(
        self,
        num_particles: int = 2,
        order: int = 1,
        guide: str = "jackknife",
        weights: str = "published",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, **kwargs)
        check_integer("JackknifeELBO", "order", order, 0)
        if order >= num_particles:
            raise ValueError(
                f"JackknifeELBO: order must be below num_particles, but order={order} with "
                f"num_particles={num_particles}."
            )
        for name, value, known in (("guide", guide, _GUIDES), ("weights", weights, _WEIGHTS)):
            if value not in known:
                raise ValueError(
                    f"JackknifeELBO: {name} must be one of {list(known)}, but it is "
                    f"{describe(value)}."
                )
        self.order = order
        self.weights = weights
        self.guide = guide
        self._guide_bound: MultiSampleELBO | None = None
        if order and guide == "importance-weighted":
            self._guide_bound = ImportanceWeightedELBO(num_particles)
        elif order and weights == "nonnegative":
            self._guide_bound = JackknifeELBO(num_particles, order, "jackknife", "published")

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return jackknife(log_w, self.order)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        return jackknife_derivatives(log_w, self.order)

    def model_weights(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the weights of the model's gradient; see the description of the class."""
        first, _ = self.derivatives(log_w)
        if self.weights == "published":
            return first
        first = first.relu()
        return first / first.sum(0)

    @property
    def guide_bound(self) -> MultiSampleELBO:
        """The estimator that trains the guide."""
        return self if self._guide_bound is None else self._guide_bound
