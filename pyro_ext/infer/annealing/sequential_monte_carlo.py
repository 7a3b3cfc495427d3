import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer, check_real, check_type
from pyro_ext.distributed.joint_call import joint_call
from pyro_ext.infer.annealing.posterior_draws import PosteriorDraws
from pyro_ext.infer.annealing.tempered_sampler import TemperedSampler
from pyro_ext.infer.evidence.checks import warn_of_flags
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.tracing import Program
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs

NAME = "sequential_monte_carlo"


def sequential_monte_carlo(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_particles: int = 256,
    num_runs: int = 16,
    chain_length: int = 8,
    target_ess: float = 0.8,
    target_acceptance: float = 0.8,
    exact_sample: dict[str, Tensor] | None = None,
    check_prior: bool = True,
    chunk_size: int | None = None,
    compile: bool | str = False,
    progress_bar: bool = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> PosteriorDraws:
    r"""Draw from the posterior, and estimate the evidence, with tempered particles.

    .. math::

        \hat Z = \prod_{t=1}^T \frac{1}{N} \sum_{n=1}^N
            \left( \frac{p(x, z_{t-1}^n)}{q(z_{t-1}^n)} \right)^{\beta_t - \beta_{t-1}}, \qquad
        0 = \beta_0 < \dots < \beta_T = 1

    Particles start as draws of the guide q, or of the prior without a guide. They follow the path
    :math:`p(x, z)^{\beta} q(z)^{1 - \beta}` to the posterior. At each inverse temperature
    :math:`\beta_t`, the particles are reweighted, N / P of them are resampled, and a chain of P
    particles grows from each by Hamiltonian Monte Carlo in unconstrained space. Where they cost
    less, Metropolis-Hastings proposals make most of a chain: draws from q, or from a normal
    distribution that is fitted to the particles. Several runs progress at once, independently of
    each other.

    A first pass of four runs finds the settings, which are then fixed: inverse temperatures by the
    effective sample size, the covariances of the particles, step sizes by the acceptance, and the
    number of transitions by the correlation along a chain. With fixed settings,
    :math:`E \hat Z = p(x)` for any number of particles. The evidence is the mean over runs, and its
    standard error comes from the differences between runs.

    Sites of the model that are marked for enumeration, and not in the guide, are summed out. If
    plates enclose all sites, each element of these plates has its own evidence, inverse
    temperatures and resampling.

    With a guide, as many runs start at the prior. If both differ by more than noise, the result is
    the one with more evidence. Otherwise it comes from the prior, unless the guide's standard error
    is less than half as large, and the prior finds at most two standard errors more. In doubt, the
    prior has as many runs again. If the guide's runs find clearly less evidence, the guide misses a
    part of the posterior, and the evidence has the flag ``prior``.

    With an ``exact_sample`` from the posterior, as many runs pass through it, which gives a second
    estimate, from above. If the model has simulated the data, the simulated latent values are an
    exact sample. If the sample leads to more evidence, the runs miss a part of the posterior, and
    the evidence has the flag ``gap``.

    An interrupt (Ctrl-C) ends the sampling after the current transition, with a warning. The result
    then has the four runs of the first pass, if this pass was complete. Otherwise the function
    raises ``KeyboardInterrupt``. A second interrupt ends the call at once.

    Under a process group of ``torch.distributed``, call the function with the same arguments on
    each rank. The processes divide the runs, and each returns the same evidence.

    :param model: a trained SVI, or the model: a callable with Pyro primitives. Its modules must be
        in evaluation mode.
    :param guide: the guide. Its support must be that of the posterior. Leave it out after an SVI.
        If you pass no guide or None, the particles start at the prior.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_particles: the number N of particles of each run, a multiple of ``chain_length``.
    :param num_runs: the number R >= 4 of runs.
    :param chain_length: the number P >= 2 of particles of each chain.
    :param target_ess: the effective sample size at the next inverse temperature, relative to N, in
        [0.1, 0.99].
    :param target_acceptance: the acceptance probability, in [0.05, 0.99], for which step sizes are
        chosen.
    :param exact_sample: an exact sample from the posterior: a dict from the name of each latent
        site of the guide, or without a guide of the model, to its value. An automatic guide has
        sites of its own, so leave the guide out.
    :param check_prior: whether runs start at the prior, too, if there is a guide. This doubles the
        cost. A prior that cannot be drawn from is left out.
    :param chunk_size: the largest number of particles for which densities are computed at once,
        >= 1; by default 1,024.
    :param compile: whether to compute the density and its gradient by one compiled graph, under the
        contract of :class:`CompiledSVI`. This is for many transitions of a small model. A string is
        the name of a backend.
    :param progress_bar: whether to show a progress bar.
    :param max_plate_nesting: the number of nested plates, >= 0. With infinity, one run of model and
        guide finds it.
    :param kwargs: further keyword arguments of model and guide.
    :returns: the draws with their evidence, a :class:`PosteriorDraws`. If a plate is subsampled,
        they belong to one minibatch.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range, if the SVI has not been trained, if the
        model has no latent site, if a latent site is discrete or has no map to unconstrained space,
        if a density of the guide's draws is NaN, if all of them are zero, and in the cases of
        :class:`MultiSampleELBO`.

    Sources: Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo Samplers; Dau and Chopin
    (2022), Waste-Free Sequential Monte Carlo; Andrieu, Doucet and Holenstein (2010), Particle
    Markov Chain Monte Carlo Methods.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> pyro.set_rng_seed(0)
    >>> x = torch.tensor([0.5, 1.0, 1.5])
    >>> evidence = sequential_monte_carlo(model, None, x).evidence
    >>> exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    >>> bool((evidence.log_evidence - exact).abs() < 4.5 * evidence.std_error)
    True
    """
    with joint_call(NAME) as call, torch.no_grad():
        settings: dict[str, Any] = {
            "num_particles": num_particles,
            "num_runs": num_runs,
            "chain_length": chain_length,
            "chunk_size": 1024 if chunk_size is None else chunk_size,
        }
        lowest = {"num_runs": 4, "chain_length": 2}
        for name, value in settings.items():
            check_integer(NAME, name, value, lowest.get(name, 1))
        if num_particles % chain_length or num_particles < 2 * chain_length:
            raise ValueError(
                f"{NAME}: num_particles must be a multiple of chain_length, {chain_length}, and at "
                f"least twice as large, but it is {num_particles}."
            )
        check_type(NAME, "check_prior", check_prior, bool, "True or False")
        check_real(NAME, "target_ess", target_ess, 0.1, 0.99)
        check_real(NAME, "target_acceptance", target_acceptance, 0.05, 0.99)
        programs = read_programs(
            NAME, model, guide, args, kwargs, model_args, model_kwargs, without_guide=PriorProposal
        )
        settings |= {
            "target_ess": target_ess,
            "target_acceptance": target_acceptance,
            "check_prior": check_prior,
            "compile": compile,
            "max_plate_nesting": max_plate_nesting,
        }
        call.check_inputs(programs, settings, exact_sample=exact_sample)
        is_hidden = not progress_bar or call.rank > 0
        with tqdm(desc=NAME, unit="transition", disable=is_hidden) as bar:
            sampler = TemperedSampler(NAME, call, bar, **settings)
            found = sampler.posterior(programs, exact_sample)
        del bar, sampler.bar  # here, because Python ignores an interrupt inside of a destructor
    warn_of_flags(NAME, found.evidence)
    return found
