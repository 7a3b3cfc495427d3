import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import leave_one_out_log_mean_exp, leave_one_out_mean, log_mean_exp


class ImportanceWeightedELBO(MultiSampleELBO):
    r"""The importance-weighted bound (IWAE), which becomes tighter with every particle.

    .. math:: f(\log w_1, \dots, \log w_K) = \log \frac{1}{K} \sum_{k=1}^{K} w_k

    Its expectation is a lower bound of the log evidence, and does not decrease as K grows. With K =
    1 it is the ELBO.

    :param num_particles: the number of particles K >= 1.
    :param gradient: the gradient rule: ``"pathwise"``, ``"dreg"`` (doubly reparameterised) or
        ``"stl"`` (sticking the landing).
    :param vectorize_particles: whether the K particles run at once, in an extra dim on the left.
    :param max_plate_nesting: the number of nested plates, >= 0. With infinity, one run of model and
        guide finds it.
    :param strict_enumeration_warning: accepted for compatibility with Pyro, without an effect.
    :param retain_graph: whether :meth:`MultiSampleELBO.loss_and_grads` keeps the autograd graph.
    :param particle_chunk_size: the largest number of particles, >= 1, whose graph is in memory at
        once. By default, there is no limit.
    :param local_plate: the name of a plate. Sites in the plate are drawn K times, and sites outside
        it once. With None, all sites are drawn K times.

    See :class:`MultiSampleELBO` for details of these arguments, and for the errors.

    Source: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> elbo = ImportanceWeightedELBO(num_particles=5)
    >>> round(elbo.loss(model, guide, torch.zeros(3)), 4)  # the guide is the posterior
    3.7965
    """

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        return log_mean_exp(log_w)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        weights = torch.softmax(log_w, 0)
        return weights, weights * (1 - weights)

    def learning_signal(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the learning signal in O(K); see :meth:`MultiSampleELBO.learning_signal`."""
        K = log_w.shape[0]
        if K == 1:
            return self.bound(log_w).unsqueeze(0)
        others = leave_one_out_log_mean_exp(log_w) + math.log(K - 1)
        baseline = torch.logaddexp(others, leave_one_out_mean(log_w)) - math.log(K)
        return self._against_baseline(log_w, baseline)
