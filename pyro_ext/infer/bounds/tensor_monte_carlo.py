from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.tracing import ParticleTracer
from pyro_ext.tracing.advice import Advice


class TensorMonteCarloELBO(MultiSampleELBO):
    r"""The bound of all combinations of K draws of each guide site (tensor Monte Carlo).

    .. math::

        \mathrm{loss} = -\log \frac{1}{K^n} \sum_{k_1=1}^{K} \dots \sum_{k_n=1}^{K}
        \frac{p(x, z_1^{k_1}, \dots, z_n^{k_n})}{\prod_i q_i(z_i^{k_i})}, \qquad
        q_i(z) = \frac{1}{K} \sum_{k=1}^{K} q(z \mid z_1^k, \dots, z_{i-1}^k)

    The mean over all combinations has the evidence as its expectation, so the negative loss is a
    lower bound of the log evidence on average. With one site it is the importance-weighted bound.
    With n sites it has :math:`K^n` weights from n K draws. In a plate, each element has its own
    combinations. The sum is contracted site by site, as the structure of the model allows.

    A guide site that depends on earlier guide sites is drawn K times, the k-th time given their
    k-th draws. Its density in the weights is the mixture :math:`q_i`. Without such sites, the loss
    is that of Pyro's ``TraceTMC_ELBO``. That class has no mixture. With such sites its estimate of
    the evidence is biased, and its loss is not a bound.

    The model sees each guide site with a dim of its own on the left. So a model may index dims only
    from the right, as with :class:`ImportanceWeightedELBO`, and each draw must stay separate. Sites
    of the model that are marked for enumeration and not in the guide are summed out in the same
    contraction.

    All guide sites must be reparameterised, because the gradient is pathwise: that of the bound for
    fixed noise. ``"dreg"`` and ``"stl"`` are not available, because one weight has many draws of
    each site. Score-function terms are not available either.

    :param num_particles: the number of draws K >= 1 of each guide site. With K = 1 this is the
        ELBO.
    :param gradient: the gradient rule, which must be ``"pathwise"``.
    :param kwargs: further arguments of :class:`MultiSampleELBO`: ``max_plate_nesting``,
        ``strict_enumeration_warning`` and ``retain_graph``.
    :raises TypeError: if an argument has the wrong type.
    :raises NotImplementedError: if ``gradient`` is another rule, if ``vectorize_particles`` is
        False, or if ``particle_chunk_size`` or ``local_plate`` is given.
    :raises ValueError: if a run has a guide site that is not reparameterised, a site outside of a
        plate that depends on draws inside of it, or sites in different subsampled plates that
        depend on the same draws; and in the cases of :class:`MultiSampleELBO`.

    Source: Aitchison (2019), Tensor Monte Carlo: Particle Methods for the GPU era.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
    ...     b = pyro.sample("b", dist.Normal(a, 1.0))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("a", dist.Normal(x / 3, 0.8))
    ...     pyro.sample("b", dist.Normal(2 * x / 3, 0.8))
    >>> pyro.set_rng_seed(0)
    >>> elbo = TensorMonteCarloELBO(num_particles=100, max_plate_nesting=0)
    >>> abs(elbo.loss(model, guide, torch.tensor(0.0)) - 1.4682) < 0.2  # -log N(0; 0, 3**0.5)
    True
    """

    def __init__(self, num_particles: int = 2, gradient: str = "pathwise", **kwargs: Any) -> None:
        super().__init__(num_particles, gradient, **kwargs)
        refused = {
            "gradient": gradient != "pathwise",
            "vectorize_particles": not self.vectorize_particles,
            "particle_chunk_size": self.particle_chunk_size is not None,
            "local_plate": self.local_plate is not None,
        }
        for name in (name for name, is_refused in refused.items() if is_refused):
            raise NotImplementedError(
                f"TensorMonteCarloELBO does not support {name}={getattr(self, name)!r}, because "
                "one weight sums over all combinations of draws. Leave it out, or use "
                "ImportanceWeightedELBO."
            )

    @property
    def tracer(self) -> ParticleTracer:
        """The tracer that draws each guide site K times along a dim of its own."""
        tracer = super().tracer
        if self.num_particles == 1:
            return tracer
        return replace(
            tracer,
            num_particles=1,
            is_linear=True,
            num_draws=self.num_particles,
            advice=Advice("use ImportanceWeightedELBO with vectorize_particles=False"),
        )

    def bound(self, log_w: Float[Tensor, "1 *common"]) -> Float[Tensor, "*common"]:
        """Return the log weight itself, which is that of all combinations.

        :param log_w: log weights of shape ``(1, ...)``.
        :returns: a tensor of shape ``(...)``.
        """
        return log_w.squeeze(0)
