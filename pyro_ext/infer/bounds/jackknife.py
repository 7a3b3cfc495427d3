from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_integer, describe
from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import jackknife, jackknife_derivatives

_GUIDES = "importance-weighted", "jackknife"
_WEIGHTS = "importance-weighted", "nonnegative", "published"


class JackknifeELBO(MultiSampleELBO):
    r"""The jackknife estimate of the log evidence (JVI), with bias O(K^-(m+1)).

    .. math::

        f(\log w_1, \dots, \log w_K) = \sum_{j=0}^{m} c(K, m, j)\, \bar L_{K-j}, \qquad
        c(K, m, j) = \frac{(-1)^j (K - j)^m}{(m - j)!\, j!}

    Here :math:`\bar L_{K-j}` is the mean of the importance-weighted bound over all subsets of K - j
    particles.

    This estimate is not a bound: it may lie above the log evidence. For evaluation, it is better
    than the importance-weighted bound. For training, it is not. So the loss is the jackknife, but
    by default the gradients are those of the importance-weighted bound.

    ``guide="jackknife"`` trains the guide on the jackknife. Such a guide raises the estimate by
    spreading the weights, which makes it worse.

    ``weights`` selects the weights :math:`g_k` of the model's gradient
    :math:`\sum_k g_k \nabla \log p(x, z_k)`. With ``"importance-weighted"``, :math:`g_k` is
    :math:`v_k = w_k / \sum_j w_j`. With ``"published"``, it is
    :math:`f_k = \partial f / \partial \log w_k`. Because :math:`\sum_k f_k = 1`, this is an
    estimate of :math:`\nabla \log p(x)` with bias O(K^-(m+1)). Where the weights are uneven, some
    :math:`f_k` are negative, and training lowers the density of these particles. For order 1,

    .. math::

        f_k = v_k \left[\frac{1}{K} + \frac{K - 1}{K} \left(
        \frac{1}{1 - v_k} - \sum_{j=1}^{K} \frac{v_j^2}{1 - v_j} \right)\right]

    With ``"nonnegative"``, each element of the common plates uses :math:`f_k` of the largest order
    up to m at which none is negative. Order 0, with :math:`f_k = v_k`, always qualifies. If the
    weights have moments of every order, the bias is O(K^-(m+1)) as well. The :math:`g_k` are
    constants in the gradient.

    :param num_particles: the number of particles K >= 1.
    :param order: the order m, ``0 <= m < K``. Order 0 is the importance-weighted bound. One
        evaluation costs O(K^m).
    :param guide: the bound that trains the guide: ``"importance-weighted"`` or ``"jackknife"``.
    :param weights: the weights of the model's gradient: ``"importance-weighted"``,
        ``"nonnegative"`` or ``"published"``. With ``guide="jackknife"`` and
        ``weights="published"``, training is that of the source.
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
    >>> log_w = torch.tensor([[0.0, 0.0], [0.2, 1.0], [0.1, 3.0]])  # K = 3, two data points
    >>> elbo.derivatives(log_w)[0]
    tensor([[ 0.2858, -0.0661],
            [ 0.3858, -0.4531],
            [ 0.3283,  1.5192]])
    >>> elbo.model_weights(log_w)
    tensor([[0.2858, 0.0420],
            [0.3858, 0.1142],
            [0.3283, 0.8438]])
    """

    def __init__(
        self,
        num_particles: int = 2,
        order: int = 1,
        guide: str = "importance-weighted",
        weights: str = "importance-weighted",
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
        elif order and weights != "published":
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
        if self.weights == "published":
            return self.derivatives(log_w)[0]
        weights = log_w.softmax(0)
        highest = self.order if self.weights == "nonnegative" else 0
        for order in range(1, highest + 1):
            first, _ = jackknife_derivatives(log_w, order)
            weights = torch.where((first >= 0).all(0), first, weights)
        return weights

    @property
    def guide_bound(self) -> MultiSampleELBO:
        """The estimator that trains the guide."""
        return self if self._guide_bound is None else self._guide_bound

    @property
    def gradient_bound(self) -> MultiSampleELBO:
        """The importance-weighted bound, if it trains both model and guide; else this estimator."""
        trains_both = self.guide == self.weights == "importance-weighted"
        return self.guide_bound if trains_both else self
