import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_ext._arguments import abbreviate
from pyro_ext._deprecated import renamed_arguments
from pyro_ext.diagnostics.arviz_adapter import psis
from pyro_ext.diagnostics.draw_source import CannotDrawError, draw_source
from pyro_ext.diagnostics.sample_statistics import sample_statistics
from pyro_ext.diagnostics.site_arrays import Groups
from pyro_ext.ops import MIN_DRAWS, jackknife
from pyro_ext.tracing import Program
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs

NAME = "diagnose"
STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda x: x.mean(-1),
    "standard deviation": lambda x: x.std(-1),
    "smallest": lambda x: x.min(-1),
    "largest": lambda x: x.max(-1),
}


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`. It prints as a verdict in words, with figures.

    :ivar pareto_k: the Pareto k of the joint weights of all draws.
    :ivar pareto_k_local: the Pareto k of each element of the common plates; None without such
        plates.
    :ivar ess: the effective sample size of the joint weights.
    :ivar elbo: the mean log weight, in nats.
    :ivar log_evidence: the log mean weight, in nats. With common plates, it is the sum of the log
        mean weights of their elements.
    :ivar jackknife: the log evidence with the first term of its bias removed, in nats.
    :ivar num_samples: the number of draws.
    :ivar loss_change: the decrease of the mean loss from the third to the last quarter of the
        curve; NaN without losses.
    :ivar loss_change_error: the standard error of ``loss_change``, by batch means.
    :ivar predictive_p_values: for each observed site and statistic, the probability that the
        statistic is larger for drawn observations than for the data. A tie counts as one half.
    :ivar points: the names of the latent sites that the guide puts at one point (Delta).
    :ivar has_draws: whether the guide draws a latent site.
    """

    pareto_k: float
    pareto_k_local: np.ndarray | None
    ess: float
    elbo: float
    log_evidence: float
    jackknife: float
    num_samples: int
    loss_change: float
    loss_change_error: float
    predictive_p_values: dict[str, dict[str, float]]
    points: tuple[str, ...] = ()
    has_draws: bool = True

    @property
    def evidence_gap(self) -> float:
        """An estimate of a lower bound on the gap between log evidence and ELBO, in nats."""
        return max(self.log_evidence, self.elbo) - self.elbo

    def __repr__(self) -> str:
        lines = [f"Diagnosis({self.num_samples} draws)", f"  guide        {self._on_weights()}"]
        if self.pareto_k_local is not None and self._no_verdict is None:
            bad, n = int((self.pareto_k_local > 0.7).sum()), self.pareto_k_local.size
            lines.append(f"  data points  Pareto k is above 0.7 for {bad} of {n}")
        lines.append(
            f"  evidence     log evidence {self.log_evidence:.3f}, ELBO {self.elbo:.3f}, gap "
            f"{self.evidence_gap:.3f} nats (by jackknife {self.jackknife - self.elbo:.3f})"
        )
        if not math.isnan(self.loss_change):
            lines.append(f"  loss         {self._on_loss()}")
        for site, values in self.predictive_p_values.items():
            extreme = {k: p for k, p in values.items() if min(p, 1 - p) < 0.025}
            figures = ", ".join(f"{name} {p:.3f}" for name, p in (extreme or values).items())
            verdict = "does not reproduce the data" if extreme else "reproduces the data"
            lines.append(f"  {site:12} the model {verdict} (p-values: {figures})")
        return "\n".join(lines)

    @property
    def _no_verdict(self) -> str | None:
        """The reason why the weights do not tell whether the guide fits; None if they do."""
        if not self.has_draws:
            return "draws nothing, because the model has no latent sites"
        if self.points:
            return f"puts {abbreviate(self.points)} at one point, so its weights tell nothing"
        if self.num_samples < MIN_DRAWS:
            return f"needs at least {MIN_DRAWS} draws to be judged (ess {self.ess:.0f})"
        return None

    def _on_weights(self) -> str:
        figures = f"(joint Pareto k {self.pareto_k:.2f}, ess {self.ess:.0f})"
        if self._no_verdict is not None:
            return self._no_verdict
        if self.pareto_k_local is not None and (self.pareto_k_local <= 0.7).all():
            return f"fits the posterior of each data point where its draws are {figures}"
        if self.pareto_k <= 0.5:
            return f"fits the posterior where its draws are {figures}"
        if self.pareto_k <= 0.7:
            return f'can be used with importance weights, resample="psis" {figures}'
        return f"misses a part of the posterior: do not trust it {figures}"

    def _on_loss(self) -> str:
        error = f"+- {self.loss_change_error:.2g} over the last quarter"
        if self.loss_change > 2 * self.loss_change_error:
            return f"still falls, by {self.loss_change:.4g} {error}: train longer"
        if self.loss_change < -2 * self.loss_change_error:
            return f"rises, by {-self.loss_change:.4g} {error}: lower the learning rate"
        return f"has settled (it fell by {self.loss_change:.4g} {error})"


@renamed_arguments(svi="model", batch_size="chunk_size")
def diagnose(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    losses: Sequence[float] | Tensor | None = None,
    statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Diagnosis:
    r"""Check a fit by SVI: importance weights, evidence, loss curve and predictions.

    .. math:: w_s = \frac{p(x, z_s)}{q(z_s)}, \qquad z_s \sim q

    If the guide q were the posterior, all importance weights would be equal. The Pareto k
    measures how far the guide is from the posterior in the region of the largest weights. The log
    mean weight minus the mean log weight is a lower bound of
    :math:`\mathrm{KL}(q \,\|\, p(\cdot \mid x))`.

    Sites of the model that are marked for enumeration, and not in the guide, are summed out of the
    weights, and drawn for the predictions.

    Under a process group of ``torch.distributed``, each process makes all draws by itself.

    :param model: a trained SVI, or the model: a callable with Pyro primitives.
    :param guide: the guide. Leave it out after an SVI.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_samples: the number of draws, >= 2.
    :param losses: the losses of at least 8 SVI steps, to check the convergence. Without losses,
        this check is left out.
    :param statistics: the statistics of the predictive p-values: a dict from a name to a function.
        The function reduces the last dim of an array, which runs over the observations. The default
        is mean, standard deviation, smallest and largest value.
    :param chunk_size: the number of draws at once, >= 1; by default all draws, but at most 100. If
        the programs cannot take the extra dim of vectorised draws, the default is 1, with a
        warning.
    :param kwargs: further keyword arguments of model and guide.
    :returns: a :class:`Diagnosis`.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if there are fewer than 8 losses, and in the cases of :func:`from_pyro_svi`.

    Sources: Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?; Gelman, Meng and Stern
    (1996), Posterior Predictive Assessment of Model Fitness.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("loc", dist.Normal(0.75 * x.mean(), 0.1))
    >>> pyro.set_rng_seed(0)
    >>> found = diagnose(model, guide, torch.ones(3), num_samples=5000)
    >>> found.pareto_k > 0.7
    True
    """
    programs = read_programs(NAME, model, guide, args, kwargs, model_args, model_kwargs)
    source = draw_source(NAME, programs, num_samples, chunk_size)
    try:
        groups = source.draw(num_samples, predictive=True)
    except CannotDrawError as cannot:
        warnings.warn(f"{cannot} There are no predictive p-values.", stacklevel=3)
        groups = source.draw(num_samples, predictive=False)
    found = sample_statistics(groups, source.common)
    joint = found["log_weight"].values
    by_element = torch.tensor(found["log_weight_local" if source.common else "log_weight"].values)
    outside = float((joint - by_element.reshape(num_samples, -1).sum(1).numpy()).mean())
    smoothed = np.exp(psis(joint)[0])
    change, error = _loss_change(losses)
    return Diagnosis(
        pareto_k=float(found["pareto_k"].values),
        pareto_k_local=found["pareto_k_local"].values if source.common else None,
        ess=float(1 / np.square(smoothed).sum()),
        elbo=float(joint.mean()),
        log_evidence=jackknife(by_element, 0).sum().item() + outside,
        jackknife=jackknife(by_element, 1).sum().item() + outside,
        num_samples=num_samples,
        loss_change=change,
        loss_change_error=error,
        predictive_p_values={
            site: _p_values(groups, site, statistics or STATISTICS)
            for site in groups.get("posterior_predictive", {})
            if groups["is_unmasked"][site].values[0].any()
        },
        points=tuple(source.points),
        has_draws=source.has_draws,
    )


def _loss_change(losses: Sequence[float] | Tensor | None) -> tuple[float, float]:
    """Return the decrease of the mean from the third quarter to the last, and its error."""
    if losses is None:
        return math.nan, math.nan
    curve = np.asarray(losses, dtype=np.float64)
    if curve.ndim != 1 or len(curve) < 8:
        raise ValueError(
            f"{NAME}: losses must be a sequence of at least 8 numbers, but its shape is "
            f"{curve.shape}."
        )
    quarter = len(curve) // 4
    before, after = curve[-2 * quarter : -quarter], curve[-quarter:]
    # Neighbouring losses are correlated. The means of batches are less correlated.
    num_batches = max(2, min(10, quarter // 2))
    variance = 0.0
    for part in (before, after):
        means = [batch.mean() for batch in np.array_split(part, num_batches)]
        variance += float(np.var(means, ddof=1)) / num_batches
    return float(before.mean() - after.mean()), math.sqrt(variance)


def _p_values(groups: Groups, site: str, statistics: Mapping[str, Callable]) -> dict[str, float]:
    """Return the predictive p-values of a site's observations that are not masked out."""
    observed = groups["observed_data"][site].values
    drawn = groups["posterior_predictive"][site].values
    is_unmasked = groups["is_unmasked"][site].values[0]
    data = observed[0][is_unmasked].reshape(-1)
    replicated = drawn[:, is_unmasked].reshape(len(drawn), -1)
    p_values = {}
    for name, statistic in statistics.items():
        of_data, of_draws = statistic(data), statistic(replicated)
        p_values[name] = float((of_draws > of_data).mean() + (of_draws == of_data).mean() / 2)
    return p_values
