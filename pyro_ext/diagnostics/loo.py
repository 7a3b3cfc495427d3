import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from tqdm.auto import trange

from pyro_ext._arguments import check_integer, describe
from pyro_ext._deprecated import renamed_arguments
from pyro_ext.diagnostics.arviz_adapter import arviz, elpd_data, psis
from pyro_ext.diagnostics.draw_source import DrawSource, draw_source
from pyro_ext.diagnostics.sample_statistics import sample_statistics
from pyro_ext.diagnostics.site_arrays import SiteArray, is_observation, is_unmasked, joined
from pyro_ext.distributed.joint_call import JointCall, joint_call
from pyro_ext.ops import log_mean_exp
from pyro_ext.tracing import Particles, ParticleTracer, Program
from pyro_ext.tracing.advice import CHUNK_ADVICE
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs
from pyro_ext.tracing.density_sites import density_sites
from pyro_ext.tracing.failures import data_points

NAME = "loo"
_GROUPS = ("log_likelihood", "has_data", "log_p", "log_q")


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
    r"""Return the leave-one-out cross-validation of a fit by SVI, corrected for the guide's error.

    .. math::

        \widehat{\mathrm{elpd}}_n = \log \frac{\sum_s r_{sn} \, p(x_n \mid \theta_s)}
            {\sum_s r_{sn}}, \qquad
        r_{sn} \propto \frac{p(\theta_s, x)}{q(\theta_s)} \frac{1}{p(x_n \mid \theta_s)}, \qquad
        \theta_s \sim q

    The ratios r are Pareto-smoothed. Here :math:`\theta` stands for the global latent sites only.
    If there are local latent sites too,
    :math:`p(x_n \mid \theta) = \int p(x_n, z_n \mid \theta) \, dz_n` is estimated for each draw, by
    importance sampling from the guide. Using :math:`p(x_n \mid z_n, \theta)` instead would be
    wrong, because :math:`z_n` was inferred from the point :math:`x_n` that is left out. The ratios
    would be unusable, and the result would be too high.

    Sites of the model that are marked for enumeration, and not in the guide, are summed out of
    :math:`p(x_n \mid \theta)`. Observations that share such a site, as in a hidden Markov model,
    count as one.

    Without global latent sites, there is nothing from which to leave out a point: parameters that
    were learnt as point estimates depend on all data. In this case, use
    :func:`pyro_ext.infer.estimate_evidence` on held-out data.

    Under a process group of ``torch.distributed``, call the function with the same arguments on
    each rank. The processes divide the draws of the global latent sites, and each returns the same
    result.

    :param model: a trained SVI, or the model: a callable with Pyro primitives.
    :param guide: the guide. Leave it out after an SVI.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_samples: the number of draws of the global latent sites, >= 2.
    :param num_local_samples: the number of draws of the local latent sites for each global draw,
        >= 2.
    :param var_name: the name of the observed site. You can leave it out if there is only one. With
        local latent sites, all observed sites in their plate count as one.
    :param chunk_size: the number of draws at once, >= 1; by default all draws, but at most 100. If
        the programs cannot take the extra dim of vectorised draws, the default is 1, with a
        warning.
    :param progress_bar: whether to show a progress bar. It appears only for models with local
        latent sites.
    :param kwargs: further keyword arguments of model and guide.
    :returns: the result type of ``arviz.loo(..., pointwise=True)``, which ``arviz.compare`` takes.
        It includes the Pareto k of each observation.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if there are no global latent sites, if it is not clear which observed site
        to use, and in the cases of :func:`from_pyro_svi`.
    :raises ImportError: if ArviZ is not installed.

    Sources: Vehtari, Gelman and Gabry (2017), Practical Bayesian Model Evaluation Using
    Leave-One-Out Cross-Validation and WAIC; Magnusson, Andersen, Jonasson and Vehtari (2019),
    Bayesian Leave-One-Out Cross-Validation for Large Data.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("loc", dist.Normal(0.0, 0.5))
    >>> pyro.set_rng_seed(0)
    >>> found = loo(model, guide, torch.zeros(3))
    >>> found["n_data_points"]
    3
    """
    arviz()
    import xarray as xr

    with joint_call(NAME, postpones_interrupts=False) as call:
        check_integer(NAME, "num_local_samples", num_local_samples, 2)
        programs = read_programs(NAME, model, guide, args, kwargs, model_args, model_kwargs)
        settings = {
            "num_samples": num_samples,
            "num_local_samples": num_local_samples,
            "var_name": var_name,
            "chunk_size": chunk_size,
        }
        call.check_inputs(programs, settings)
        source = draw_source(NAME, programs, num_samples, chunk_size)
        call.check_parameters(programs)
        call.use_own_random_numbers()
        if source.common:
            raise ValueError(
                f"{NAME}: the model has no global latent sites, only latent sites in the plates "
                f"{list(source.common)}. Parameters that were learnt as point estimates leave "
                "nothing to average. Use pyro_ext.infer.estimate_evidence on held-out data."
            )
        if source.local_plates:
            is_shown = progress_bar and call.rank == 0
            log_weight, log_likelihood = _integrated(
                call, source, num_samples, num_local_samples, is_shown
            )
        else:
            log_weight, log_likelihood = _of_observations(call, source, num_samples, var_name)
    by_point = np.moveaxis(log_likelihood.values.astype(np.float64), 0, -1)
    smoothed, pareto_k = psis(log_weight - by_point)
    elpd = np.logaddexp.reduce(smoothed + by_point, -1)
    lppd = np.logaddexp.reduce(psis(log_weight)[0] + by_point, -1)
    elpd_i, pareto_k_i = (xr.DataArray(x, dims=log_likelihood.plates) for x in (elpd, pareto_k))
    found = elpd_data(elpd_i, float((lppd - elpd).sum()), pareto_k_i, num_samples)
    is_bad = torch.as_tensor(pareto_k > found["good_k"])
    if is_bad.any():
        warnings.warn(
            f"{NAME}: Pareto k is above {found['good_k']:.2f}{data_points(is_bad)}. A few draws "
            "dominate their expected densities, which are not reliable. Use more draws, or a guide "
            "that fits the posterior better.",
            stacklevel=3,
        )
    return found


def _of_observations(
    call: JointCall, source: DrawSource, num_samples: int, var_name: str | None
) -> tuple[np.ndarray, SiteArray]:
    """Return the log weights of the draws, and the log-likelihood of each observation of a site."""
    drawn = (source.draw(n, predictive=False) for n in call.share(num_samples, num_samples))
    parts = list(call.parts({name: groups[name] for name in _GROUPS} for groups in drawn))
    groups = {name: joined([part[name] for part in parts]) for name in _GROUPS}
    found = groups["log_likelihood"]
    if var_name is None and len(found) == 1:
        (var_name,) = found
    if var_name not in found:
        names = ", ".join(sorted(found)[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(
            f"{NAME}: var_name must be one of the observed sites ({names}), but it is "
            f"{describe(var_name)}."
        )
    array = _without_masked(found[var_name], groups["has_data"][var_name].values[0])
    return sample_statistics(groups, source.common)["log_weight"].values, array


def _integrated(
    call: JointCall,
    source: DrawSource,
    num_samples: int,
    num_local_samples: int,
    progress_bar: bool,
) -> tuple[np.ndarray, SiteArray]:
    """Return log weights and log-likelihoods with the local latent sites integrated out.

    There is one integral for each draw of the global latent sites.
    """
    if source.row_plate:
        raise ValueError(
            f"{NAME}: plate '{source.row_plate.name}' is subsampled. With local latent sites, pass "
            "all of its rows and no subsample_size."
        )
    plate, *others = source.local_plates
    if others:
        raise ValueError(
            f"{NAME}: plates '{plate}' and '{others[0]}' both hold local latent sites and data. "
            "Use one plate for them."
        )
    if plate not in source.drawn_plates:
        raise ValueError(
            f"{NAME}: the guide draws the latent sites in plate '{plate}' together with others, as "
            "AutoMultivariateNormal does, or puts them at points. They cannot be integrated out "
            "for each data point. Use a guide that draws each site separately, such as AutoNormal."
        )
    tracer = ParticleTracer(
        num_local_samples,
        vectorize=source.chunk_size > 1,
        max_plate_nesting=source.nesting,
        local_plate=plate,
        is_proposal=True,
        advice=CHUNK_ADVICE,
    )
    parts = call.parts(
        _integrals(tracer, source, trange(n, desc=NAME, disable=not progress_bar))
        for n in call.share(num_samples, num_samples)
    )
    log_weights, arrays = zip(*parts, strict=True)
    return np.concatenate(log_weights), joined([{"": array} for array in arrays])[""]


def _integrals(
    tracer: ParticleTracer, source: DrawSource, draws: Iterable[int]
) -> tuple[np.ndarray, SiteArray]:
    """Return log weights and log-likelihoods for some draws of the global latent sites."""
    log_weights, log_likelihoods = [], []
    for _ in draws:
        with torch.no_grad():
            particles = tracer.trace(source.programs)
        log_likelihood = log_mean_exp(particles.log_w.double())
        log_weights.append(particles.unscaled_outer + log_likelihood.sum().item())
        log_likelihoods.append(log_likelihood.cpu().numpy())
    names = tuple(p.name for p in particles.plates)
    array = SiteArray(names, np.stack(log_likelihoods))
    return np.array(log_weights), _without_masked(array, _has_observation(particles))


def _has_observation(particles: Particles) -> np.ndarray:
    """Return which elements of the common plates have an observation that is not masked out."""
    dims = [plate.dim or 0 for plate in particles.plates]
    found = torch.zeros([plate.size for plate in particles.plates], dtype=torch.bool)
    for site in density_sites("model", particles.model_traces[0]):
        if is_observation(site.node) and site.plates.issuperset(particles.plates):
            mask = is_unmasked(site.node).cpu()
            for dim in range(-mask.dim(), 0):
                if dim not in dims:
                    mask = mask.any(dim, keepdim=True)
            found = found | mask.reshape([mask.shape[dim] for dim in dims])
    return found.numpy()


def _without_masked(array: SiteArray, is_unmasked: np.ndarray) -> SiteArray:
    """Return the observations that are not masked out, along a single dim if some are."""
    if is_unmasked.all():
        return array
    return SiteArray(("observation",), array.values[:, is_unmasked])
