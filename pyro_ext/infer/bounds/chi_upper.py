import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_real
from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import log_mean_exp


class ChiUpperELBO(ImportanceWeightedELBO):
    r"""The importance-weighted bound for the model and the chi upper bound for the guide (CUBO).

    .. math::

        \mathrm{CUBO}_n = \frac{1}{n} \log \mathrm{E}_q \Bigl[ \Bigl(
        \frac{p(x, z)}{q(z)} \Bigr)^n \Bigr] \ge \log p(x), \qquad n > 1

    The guide minimises this upper bound, which is the chi divergence from the guide to the
    posterior. Such a guide covers the posterior, as a proposal should. It is wider than a guide
    that the ELBO trains. An upper bound must not train the model: a model lowers it by making the
    data less probable. So the loss and the gradient of the model are those of
    :class:`ImportanceWeightedELBO`. With K = 1, all is the ELBO.

    :meth:`upper_bound` estimates the CUBO from log weights. On the same log weights, it is at least
    ``bound``. The estimate is biased downwards (Jensen), often by far: it may lie below log
    p(x) unless K is large.

    For the same reason, minimising the estimate itself would drive the guide away from the
    posterior. As in the source, the guide minimises :math:`\exp(n \, \mathrm{CUBO}_n)`, whose
    estimate has no bias. Its gradient is divided by the sum of the :math:`w_k^n`, as a constant.
    With ``"dreg"``, and :math:`v = \mathrm{softmax}(n \log w)`, the gradient of the guide is

    .. math:: -(n - 1) \sum_k v_k \, \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

    Its bias is O(1 / K). If few particles dominate, it is close to the gradient of the ELBO, so it
    covers less than the CUBO asks for. With ``"pathwise"``, the gradient then points away from the
    posterior. Use ``"pathwise"`` only with many particles, or for guides with discrete sites alone,
    which ``"dreg"`` refuses.

    The noise of the gradient grows with the order and with the distance between guide and
    posterior. ``python -m benchmarks --only chi_upper`` prints the signal-to-noise ratio of the
    gradient in the guide's scale, for a standard normal posterior in d dims and 100 particles. The
    guide is too wide or too narrow, and off by 0.2 in each dim. Steps with a negative ratio go the
    wrong way. For the narrow guide, the CUBO of order 2 is infinite.

    =====================  ==============  =============  ==============  =============
    estimator              scale 1.2, d=1  d=20           scale 0.7, d=1  d=20
    =====================  ==============  =============  ==============  =============
    IWAE, ``"dreg"``       7.5             7.4            0.24            0.93
    chi 2, ``"dreg"``      7.8             6.3            1.7             7.6
    chi 4, ``"dreg"``      6.9             4.4            2.5             8.3
    IWAE, ``"pathwise"``   -0.0013         0.16           0.16            1.8
    chi 2, ``"pathwise"``  2.1             1.5            0.75            -0.95
    =====================  ==============  =============  ==============  =============

    :param num_particles: the number of particles K >= 1.
    :param order: the order n > 1 of the bound. The bound increases with n, and so does its noise.
    :param gradient: the gradient rule, ``"dreg"`` or ``"pathwise"``.
    :param kwargs: further arguments of :class:`MultiSampleELBO`, but not ``local_plate``:
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph`` and ``particle_chunk_size``. The guide must not put sites at points that
        are parameters, as ``AutoDelta`` does: they would be trained like the guide, and lower the
        density.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``order`` is not above 1, with ``gradient="stl"``, which drops a term
        that is larger than the rest, with ``local_plate``, because the upper bound would train the
        global sites, and in the cases of :class:`MultiSampleELBO`.

    Source: Dieng, Tran, Ranganath, Paisley and Blei (2017), Variational Inference via chi Upper
    Bound Minimization.

    >>> elbo = ChiUpperELBO(num_particles=3)
    >>> log_w = torch.tensor([0.0, 1.0, 2.0])
    >>> elbo.bound(log_w), elbo.upper_bound(log_w)
    (tensor(1.3090), tensor(1.5222))
    """

    def __init__(
        self, num_particles: int = 2, order: float = 2.0, gradient: str = "dreg", **kwargs: Any
    ) -> None:
        super().__init__(num_particles, gradient, **kwargs)
        check_real("ChiUpperELBO", "order", order, 1.0, math.inf)
        if order in (1, math.inf):
            raise ValueError(
                f"ChiUpperELBO: order must be above 1 and finite, but it is {order}. Order 1 is "
                "log p(x) for every guide."
            )
        if gradient == "stl":
            raise ValueError(
                "ChiUpperELBO: gradient='stl' drops a term that is larger than the rest, so it "
                "would drive the guide away. Use gradient='dreg'."
            )
        if self.local_plate is not None:
            raise ValueError(
                "ChiUpperELBO: local_plate does not go with an upper bound, which would train the "
                "sites outside of the plate to lower the density. Use ImportanceWeightedELBO."
            )
        self.order = order
        self._guide_bound = _ScaledChi(num_particles, order)

    @property
    def guide_bound(self) -> MultiSampleELBO:
        """The negative upper bound, which trains the guide; this estimator for K = 1."""
        return self if self.num_particles == 1 else self._guide_bound

    def upper_bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        """Return the estimate of the CUBO, the log of the n-th power mean of the weights.

        :param log_w: log weights of shape ``(K, ...)``.
        :returns: a tensor of shape ``(...)``, in nats.
        """
        return log_mean_exp(self.order * log_w) / self.order


class _ScaledChi(MultiSampleELBO):
    """The negative of exp(n CUBO) / n, divided by its value, which counts as a constant."""

    def __init__(self, num_particles: int, order: float) -> None:
        super().__init__(num_particles)
        self.order = order

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return -log_mean_exp(self.order * log_w) / self.order

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives for a constant divisor."""
        weights = torch.softmax(self.order * log_w, 0)
        return -weights, -self.order * weights

    def learning_signal(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the term of each particle, minus the mean of the other terms."""
        weights = torch.softmax(self.order * log_w, 0)
        K = len(log_w)
        return (1 - K * weights) / ((K - 1) * self.order)
