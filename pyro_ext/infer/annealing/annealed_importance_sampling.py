import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer, check_real, check_type
from pyro_ext.distributed.joint_call import joint_call
from pyro_ext.infer.annealing.annealed_evidence import AnnealedEvidence
from pyro_ext.infer.annealing.annealer import NUM_WARMUP, Annealer
from pyro_ext.infer.annealing.compiled_slopes import chosen_slopes
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.temperature_paths import inverse_temperatures
from pyro_ext.infer.annealing.tempered_sampler import TemperedSampler
from pyro_ext.infer.annealing.unconstrained import UnconstrainedPrograms
from pyro_ext.infer.evidence.checks import checked_orders, warn_of_flags, warn_of_heavy_tails
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.tracing import Program
from pyro_ext.tracing.arguments import NOT_GIVEN, read_programs

NAME = "annealed_importance_sampling"


def annealed_importance_sampling(
    model: Program | SVI,
    guide: Any = NOT_GIVEN,
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog_steps: int = 10,
    ladder: str | Sequence[float] = "sigmoid",
    target_acceptance: float = 0.8,
    exact_sample: dict[str, Tensor] | None = None,
    check_prior: bool = False,
    chunk_size: int | None = None,
    jackknife_orders: Iterable[int] = (),
    progress_bar: bool = False,
    compile: bool | str = False,
    max_plate_nesting: float = math.inf,
    **kwargs: Any,
) -> AnnealedEvidence:
    r"""Estimate the log evidence with annealed chains from the guide to the posterior.

    .. math::

        \log w = \sum_{t=0}^{T-1} (\beta_{t+1} - \beta_t)
            \bigl( \log p(x, z_t) - \log q(z_t) \bigr), \qquad z_0 \sim q, \quad
        z_t \sim \mathcal{T}_t(\cdot \mid z_{t-1}), \qquad 0 = \beta_0 < \dots < \beta_T = 1

    The transition :math:`\mathcal{T}_t` is Hamiltonian Monte Carlo in unconstrained space. It
    leaves :math:`p(x, z)^{\beta_t} q(z)^{1 - \beta_t}` invariant, so :math:`E w = p(x)` for any
    number of temperatures. With many temperatures, the weights vary little even if the guide is far
    from the posterior. The estimate can therefore serve as a reference for other estimates.

    Sites of the model that are marked for enumeration, and not in the guide, are summed out. The
    chains then move on the marginal density of the other sites.

    Chains and data points run at once, and each transition is accepted separately. A first pass
    finds a step size for each temperature and data point. The chains of this pass are then
    discarded. Step sizes are relative to the spread of the guide's draws.

    With an ``exact_sample`` from the posterior, chains in reverse give a second estimate, from
    above. For the reverse chains, :math:`E \, w^{-1} = p(x)^{-1}`. If the model has simulated the
    data, the simulated latent values are an exact sample. The two estimates then bracket the
    evidence (bidirectional Monte Carlo).

    With ``check_prior=True``, the evidence from a guide is compared with that of
    :func:`sequential_monte_carlo` from the prior. If the prior leads to more evidence, the guide
    misses a part of the posterior, and the result has the flag ``prior``.

    An interrupt (Ctrl-C) ends the sampling after the current transition, with a warning, and the
    result uses the chunks of chains that were complete. If there are none, it raises
    ``KeyboardInterrupt``. A second interrupt ends the call at once.

    Under a process group of ``torch.distributed``, call the function with the same arguments on
    each rank. The processes divide the chains, and each returns the same result. The first pass
    runs on each rank with the same random numbers.

    :param model: a trained SVI, or the model: a callable with Pyro primitives. Its modules must be
        in evaluation mode.
    :param guide: the guide. Its support must be that of the posterior. Leave it out after an SVI.
        If you pass no guide or None, the chains start at the prior.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_chains: the number of chains C >= 1 for each data point.
    :param num_temperatures: the number of steps T >= 1 from the guide to the posterior.
    :param num_leapfrog_steps: the number of leapfrog steps >= 1 in a transition. Each step computes
        one gradient.
    :param ladder: the spacing of the inverse temperatures between 0 and 1. ``"sigmoid"`` has a
        finer spacing at both ends, and ``"geometric"`` has a finer spacing near 0, at the guide.
        You can also pass the inverse temperatures themselves, as a sequence from 0 to 1.
        ``num_temperatures`` is then not used.
    :param target_acceptance: the acceptance probability, in [0.05, 0.99], for which step sizes are
        chosen.
    :param exact_sample: an exact sample from the posterior: a dict from the name of each latent
        site of the guide, or without a guide of the model, to its value. An automatic guide has
        sites of its own, so leave the guide out.
    :param check_prior: whether to compare a guide's evidence with the evidence from the prior. This
        takes seconds for a small model. A prior that cannot be drawn from is not compared.
    :param chunk_size: the largest number of chains at once in a process, >= 1; by default all
        chains, but at most 100.
    :param jackknife_orders: the orders m of the jackknife estimates, ``0 <= m < C``.
    :param progress_bar: whether to show a progress bar.
    :param compile: whether to compute the density and its gradient by one compiled graph, under the
        contract of :class:`CompiledSVI`. The results are the same up to rounding. Compiling takes
        seconds. Programs that cannot be captured run without a graph, with one warning.
        ``"eager"`` makes a graph and does not compile it.
    :param max_plate_nesting: the number of nested plates, >= 0. With infinity, one run of model and
        guide finds it.
    :param kwargs: further keyword arguments of model and guide.
    :returns: an :class:`AnnealedEvidence`. If a plate is subsampled, it belongs to one minibatch.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range, if the SVI has not been trained, if a latent
        site is discrete or has no map to unconstrained space, if weights are NaN, if all weights of
        a data point are zero, and in the cases of :class:`MultiSampleELBO`.

    Sources: Neal (2001), Annealed Importance Sampling; Wu, Burda, Salakhutdinov and Grosse (2017),
    On the Quantitative Analysis of Decoder-Based Generative Models; Grosse, Ghahramani and Adams
    (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> pyro.set_rng_seed(0)
    >>> simulated = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(torch.zeros(3))
    >>> x, z = simulated.nodes["x"]["value"], simulated.nodes["z"]["value"]
    >>> found = annealed_importance_sampling(
    ...     model, None, x, exact_sample={"z": z}, num_temperatures=10
    ... )
    >>> exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    >>> bool(((found.log_evidence - exact).abs() < 0.5).all() and (found.upper > exact - 0.5).all())
    True
    """
    with joint_call(NAME) as call, torch.no_grad():
        settings: dict[str, Any] = {
            "num_chains": num_chains,
            "num_temperatures": num_temperatures,
            "num_leapfrog_steps": num_leapfrog_steps,
            "chunk_size": 1 if chunk_size is None else chunk_size,
        }
        for name, value in settings.items():
            check_integer(NAME, name, value, 1)
        check_type(NAME, "check_prior", check_prior, bool, "True or False")
        orders = checked_orders(NAME, jackknife_orders, num_chains)
        check_real(NAME, "target_acceptance", target_acceptance, 0.05, 0.99)
        betas = inverse_temperatures(ladder, num_temperatures)
        programs = read_programs(
            NAME, model, guide, args, kwargs, model_args, model_kwargs, without_guide=PriorProposal
        )
        settings |= {
            "ladder": betas,
            "target_acceptance": target_acceptance,
            "jackknife_orders": orders,
            "check_prior": check_prior,
            "max_plate_nesting": max_plate_nesting,
        }
        call.check_inputs(programs, settings, exact_sample=exact_sample)
        size = min(num_chains, chunk_size or 100)
        num_passes = -(-num_chains // (size * call.size)) * (1 if exact_sample is None else 2)
        total = (num_passes + 1) * (len(betas) - 2) + NUM_WARMUP
        densities = UnconstrainedPrograms(NAME, programs, max_plate_nesting)
        target = FlatTarget(densities, None, chosen_slopes(NAME, compile))
        is_hidden = not progress_bar or call.rank > 0
        bar = tqdm(total=total, desc=NAME, unit="transition", disable=is_hidden)
        annealer = Annealer(target, betas, num_leapfrog_steps, target_acceptance, call, bar)
        sampler = TemperedSampler(NAME, call, bar, chunk_size or 1024, max_plate_nesting, compile)
        with bar:
            evidence = annealer.run(num_chains, size, orders, exact_sample, sampler, check_prior)
        del bar, annealer, sampler  # here, because Python ignores an interrupt in a destructor
    if num_chains >= 100:  # with fewer chains, Pareto k is unreliable
        warn_of_heavy_tails(NAME, evidence, "Use more temperatures, or more leapfrog steps.")
    warn_of_flags(NAME, evidence)
    return evidence
