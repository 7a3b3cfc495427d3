import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import check_integer, check_positive
from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.ops import leave_one_out_log_mean_exp, leave_one_out_mean, log_mean_exp
from pyro_ext.ops.precision import accumulation_dtype
from pyro_ext.tracing import Particles, Program


class MultilevelELBO(MultiSampleELBO):
    r"""The multilevel estimate of the log evidence, with a random number of particles.

    Each evaluation draws a level J, and then :math:`2^J K_0` particles. Let :math:`A_l` be the mean
    of the importance-weighted bounds of all consecutive blocks of :math:`2^l K_0` particles. The
    estimate is

    .. math::

        f = A_0 + \sum_{l=1}^{J} \frac{A_l - A_{l-1}}{P(J \ge l)}, \qquad
        P(J \ge l) = 2^{-r l} \quad \text{for } l \le L

    Its mean over J and the particles is exactly that of the importance-weighted bound with
    :math:`2^L K_0` particles. Its bias as an estimate of log p(x), and the bias of the model's
    gradient, are those of this bound: O(:math:`2^{-L} / K_0`). The number of particles is
    :attr:`expected_num_particles` on average. With the default rate and level, it is 2.1
    :math:`K_0` for the bias of 128 :math:`K_0` particles.

    The estimate is not a bound, and its variance is higher than that of a bound with the same
    number of particles. The variance of a difference :math:`A_l - A_{l-1}` falls as
    :math:`4^{-l}` once a block has many particles with even weights. If one weight dominates
    blocks of this size, it does not fall, and rare steps of high levels have large gradients.

    The guide is trained on the importance-weighted bound with the particles of the step. All
    elements of the common plates share the level of the step. With :class:`CompiledSVI`, each level
    has its own graph, so a larger ``max_level`` needs a larger ``max_graphs``.

    :param num_particles: the number of particles at level 0, :math:`K_0 \ge 1`.
    :param max_level: the largest level :math:`L \ge 0`. With 0, this is the importance-weighted
        bound.
    :param rate: the rate r > 0. Below 1, the expected number of particles grows with
        ``max_level``. Above 2, the variance does. The product of both is least near 1.5.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``gradient``,
        ``vectorize_particles``, ``max_plate_nesting``, ``strict_enumeration_warning``,
        ``retain_graph``, ``particle_chunk_size`` and ``local_plate``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``max_level`` or ``rate`` is out of range, if a block of particles has
        only weights of zero, and in the cases of :class:`MultiSampleELBO`.

    Sources: Luo, Beatson, Norouzi, Zhu, Duvenaud, Adams and Chen (2020), SUMO: Unbiased Estimation
    of Log Marginal Probability for Latent Variable Models. Ishikawa and Goda (2021), Efficient
    Debiased Evidence Estimation by Multilevel Monte Carlo Sampling. Shi and Cornish (2021), On
    Multilevel Monte Carlo Unbiased Gradient Estimation For Deep Latent Variable Models.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> elbo = MultilevelELBO(num_particles=2, max_level=4)
    >>> round(elbo.expected_num_particles, 2), elbo.max_num_particles
    (3.81, 32)
    >>> round(elbo.loss(model, guide, torch.zeros(3)), 4)  # the guide is the posterior
    3.7965
    """

    def __init__(
        self, num_particles: int = 2, max_level: int = 7, rate: float = 1.5, **kwargs: Any
    ) -> None:
        super().__init__(num_particles, **kwargs)
        check_integer("MultilevelELBO", "max_level", max_level, 0)
        check_positive("MultilevelELBO", "rate", rate)
        self.first_num_particles = num_particles
        self.max_level = max_level
        self.rate = rate
        self._guide_bound = ImportanceWeightedELBO(num_particles)
        self._holds_level = False

    @property
    def max_num_particles(self) -> int:
        """The number of particles at the largest level."""
        return self.first_num_particles << self.max_level

    @property
    def expected_num_particles(self) -> float:
        """The expected number of particles of an evaluation."""
        more = sum(2 ** (level - 1 - self.rate * level) for level in range(1, self.max_level + 1))
        return self.first_num_particles * (1 + more)

    @property
    def is_linear(self) -> bool:
        """Whether the bound is the mean of the log weights; see :class:`MultiSampleELBO`."""
        return self.max_num_particles == 1

    @property
    def guide_bound(self) -> MultiSampleELBO:
        """The importance-weighted bound, which trains the guide."""
        return self._guide_bound

    @contextmanager
    def held_level(self) -> Iterator[None]:
        """Draw a level, and keep it for every evaluation in a ``with`` block.

        In the block, ``num_particles`` is the number of particles of this level.
        """
        if self._holds_level:
            yield
            return
        uniform = torch.rand((), dtype=torch.float64).item()
        level = min(math.floor(-math.log2(1 - uniform) / self.rate), self.max_level)
        self.num_particles, self._holds_level = self.first_num_particles << level, True
        try:
            yield
        finally:
            self.num_particles, self._holds_level = self.first_num_particles, False

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        terms = [factor * log_mean_exp(blocks, 1).mean(0) for factor, blocks in self._levels(log_w)]
        return sum(terms[1:], terms[0]).to(log_w.dtype)

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the derivatives in closed form; see :meth:`MultiSampleELBO.derivatives`."""
        first, second = torch.zeros(2, *log_w.shape, dtype=_wide(log_w), device=log_w.device)
        for factor, blocks in self._levels(log_w):
            weights = blocks.softmax(1)
            weighted = factor / len(blocks) * weights
            first = first + weighted.flatten(0, 1)
            second = second + (weighted * (1 - weights)).flatten(0, 1)
        return first.to(log_w.dtype), second.to(log_w.dtype)

    def learning_signal(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the learning signal in O(K); see :meth:`MultiSampleELBO.learning_signal`."""
        if log_w.shape[0] == 1:
            return self.bound(log_w).unsqueeze(0)
        mean = leave_one_out_mean(log_w).to(_wide(log_w))
        signal = torch.zeros_like(mean)
        for factor, blocks in self._levels(log_w):
            num_blocks, size = blocks.shape[:2]
            value, baseline = log_mean_exp(blocks, 1).unsqueeze(1), mean.unflatten(0, (-1, size))
            if size > 1:
                others = leave_one_out_log_mean_exp(blocks, 1) + math.log(size - 1)
                baseline = torch.logaddexp(others, baseline) - math.log(size)
            baseline = baseline.where(baseline.isfinite(), 0.0)
            signal = signal + (factor / num_blocks * (value - baseline)).flatten(0, 1)
        return signal.to(log_w.dtype)

    def _levels(
        self, log_w: Float[Tensor, "K *common"]
    ) -> Iterator[tuple[float, Float[Tensor, "M L *common"]]]:
        """Yield the factor of A_l in the estimate, and the log weights in blocks, for each l."""
        size, rest = divmod(log_w.shape[0], self.first_num_particles)
        level = size.bit_length() - 1
        if rest or size != 1 << level or level > self.max_level:
            raise ValueError(
                f"MultilevelELBO: the number of log weights must be {self.first_num_particles} "
                f"times a power of two up to {1 << self.max_level}, but log_w has shape "
                f"{tuple(log_w.shape)}."
            )
        wide = log_w.to(_wide(log_w))
        inverses = [2 ** (self.rate * lower) for lower in range(level + 1)]  # of P(J >= l)
        for lower, (one, next_one) in enumerate(pairwise([*inverses, 0.0])):
            yield one - next_one, wide.unflatten(0, (-1, self.first_num_particles << lower))

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss at a drawn level; see :meth:`MultiSampleELBO.loss`."""
        with self.held_level():
            return super().loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Estimate loss and gradients at a drawn level; see :class:`MultiSampleELBO`."""
        with self.held_level():
            return super().loss_and_grads(model, guide, *args, **kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss as a tensor, at a drawn level; see :class:`MultiSampleELBO`."""
        with self.held_level():
            return super().differentiable_loss(model, guide, *args, **kwargs)

    def trace_particles(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Particles:
        """Trace the particles of a drawn level; see :meth:`MultiSampleELBO.trace_particles`."""
        with self.held_level():
            return super().trace_particles(model, guide, args, kwargs)


def _wide(log_w: Tensor) -> torch.dtype:
    return accumulation_dtype(log_w.device)
