from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer
from pyro_ext._deprecated import renamed_arguments
from pyro_ext.diagnostics.arviz_adapter import arviz, elpd_data, psis
from pyro_ext.diagnostics.draw_source import DrawSource, draw_source
from pyro_ext.diagnostics.sample_statistics import sample_statistics
from pyro_ext.diagnostics.site_arrays import SiteArray
from pyro_ext.ops import log_mean_exp
from pyro_ext.tracing import ParticleTracer, Program
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs

NAME = "loo"


@renamed_arguments(svi="model", batch_size="chunk_size")
def loo(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    num_local_samples: int = 100,
    var_name: str | None = None,
    chunk_size: int | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> Any:
    r"""Leave-one-out cross-validation of a fit by SVI, corrected for the error of the guide.

    .. math::

        \widehat{\mathrm{elpd}}_n = \log \frac{\sum_s r_{sn} \, p(x_n \mid \theta_s)}
            {\sum_s r_{sn}}, \qquad
        r_{sn} \propto \frac{p(\theta_s, x)}{q(\theta_s)} \frac{1}{p(x_n \mid \theta_s)}, \qquad
        \theta_s \sim q

    with Pareto-smoothed r. Here :math:`\theta` stands for the global latent sites alone. Where
    there are local ones too, :math:`p(x_n \mid \theta) = \int p(x_n, z_n \mid \theta) \, dz_n` is
    estimated by importance sampling from the guide, for each draw. With
    :math:`p(x_n \mid z_n, \theta)` in its place, leaving out :math:`x_n` would leave a
    :math:`z_n` that has seen it: the ratios would be hopeless, and the result too good.

    Without global latent sites there is nothing to leave out a point of: parameters that were
    learnt as points have seen all data. Use :func:`pyro_ext.infer.estimate_evidence` on data that
    were held out.

    Sources: Vehtari, Gelman and Gabry (2017), Practical Bayesian Model Evaluation Using
    Leave-One-Out Cross-Validation and WAIC; Magnusson, Andersen, Jonasson and Vehtari (2019),
    Bayesian Leave-One-Out Cross-Validation for Large Data.

    :param model: a :class:`pyro.infer.SVI` that has been stepped, or the model.
    :param guide: the guide. Leave it out after an SVI.
    :param args: positional arguments of model and guide.
    :param model_args: the same as a sequence, in place of ``args``.
    :param model_kwargs: keyword arguments of both whose names clash with those below.
    :param int num_samples: draws of the global latent sites, 2 or more.
    :param int num_local_samples: draws of the local ones for each of these, 2 or more.
    :param str var_name: the observed site; None if there is one. With local latent sites, all
        observed sites in their plate count as one.
    :param int chunk_size: how many draws run at once, vectorised unless it is 1; at most 100 by
        default.
    :param bool progress_bar: whether to show one, where local latent sites are integrated out.
    :param kwargs: keyword arguments of both, under other names than those above.
    :returns: what ``arviz.loo(..., pointwise=True)`` returns: for ``arviz.compare``, and with the
        Pareto k of each observation.
    :raises ValueError: if there are no global latent sites, if the observed site is not clear, and
        where :func:`from_pyro_svi` raises it.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> pyro.set_rng_seed(0)
    >>> found = loo(model, AutoNormal(model, init_scale=0.5), torch.zeros(3))
    >>> found["n_data_points"]
    3
    """
    arviz()
    import xarray as xr

    check_integer(NAME, "num_local_samples", num_local_samples, 2)
    programs = read_programs(NAME, model, guide, args, kwargs, model_args, model_kwargs)
    source = draw_source(NAME, programs, num_samples, chunk_size)
    if source.common:
        raise ValueError(
            f"{NAME}: expected global latent sites, got latent sites in the plates "
            f"{list(source.common)} alone. Parameters that were learnt as points leave nothing to "
            "average: use pyro_ext.infer.estimate_evidence on held-out data."
        )
    if source.local_plates:
        log_weight, log_likelihood = _integrated(
            source, num_samples, num_local_samples, progress_bar
        )
    else:
        log_weight, log_likelihood = _of_observations(source, num_samples, var_name)
    by_point = np.moveaxis(log_likelihood.values.astype(np.float64), 0, -1)
    smoothed, pareto_k = psis(log_weight - by_point)
    elpd = np.logaddexp.reduce(smoothed + by_point, -1)
    lppd = np.logaddexp.reduce(psis(log_weight)[0] + by_point, -1)
    elpd_i, pareto_k_i = (xr.DataArray(x, dims=log_likelihood.plates) for x in (elpd, pareto_k))
    return elpd_data(elpd_i, float((lppd - elpd).sum()), pareto_k_i, num_samples)


def _of_observations(
    source: DrawSource, num_samples: int, var_name: str | None
) -> tuple[np.ndarray, SiteArray]:
    """Log weights of the draws, and the log-likelihood of each observation of a site."""
    groups = source.draw(num_samples, predictive=False)
    found = groups["log_likelihood"]
    if var_name is None and len(found) == 1:
        (var_name,) = found
    if var_name not in found:
        raise ValueError(
            f"{NAME}: expected var_name to be one of the observed sites {sorted(found)}, got "
            f"{var_name!r}."
        )
    array, is_unmasked = found[var_name], groups["is_unmasked"][var_name].values[0]
    if not is_unmasked.all():
        # One dim, of the observations that there are.
        array = SiteArray(("observation",), array.values[:, is_unmasked])
    return sample_statistics(groups, source.common)["log_weight"].values, array


def _integrated(
    source: DrawSource, num_samples: int, num_local_samples: int, progress_bar: bool
) -> tuple[np.ndarray, SiteArray]:
    """The same with the local latent sites integrated out, for each draw of the global ones."""
    if len(source.local_plates) > 1 or source.row_plate:
        raise ValueError(
            f"{NAME}: expected local latent sites in one plate, with all of its rows, got the "
            f"plates {list(source.local_plates)}{', subsampled' if source.row_plate else ''}."
        )
    (plate,) = source.local_plates
    tracer = ParticleTracer(
        num_local_samples,
        vectorize=source.chunk_size > 1,
        max_plate_nesting=source.nesting,
        local_plate=plate,
        remedy="chunk_size=1",
    )
    log_weights, log_likelihoods = [], []
    for _ in tqdm(range(num_samples), desc=NAME, disable=not progress_bar):
        with torch.no_grad():
            particles = tracer.trace(source.programs)
        log_likelihood = log_mean_exp(particles.log_w.double())
        log_weights.append(float(particles.outer) + log_likelihood.sum().item())
        log_likelihoods.append(log_likelihood.cpu().numpy())
    names = tuple(p.name for p in particles.plates)
    return np.array(log_weights), SiteArray(names, np.stack(log_likelihoods))
