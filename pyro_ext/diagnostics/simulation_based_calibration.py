import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer
from pyro_ext._interruption import Interrupts
from pyro_ext.diagnostics.calibration import Calibration, tested
from pyro_ext.diagnostics.free_model import free_model
from pyro_ext.diagnostics.site_arrays import is_unmasked
from pyro_ext.distributed.joint_call import joint_call
from pyro_ext.tracing import ParticleTracer, Program, Programs
from pyro_ext.tracing.arguments import check_program, read_programs
from pyro_ext.tracing.enumerated_draws import latent_draws
from pyro_ext.tracing.enumeration import is_marked
from pyro_ext.tracing.sites import is_masked_out

NAME = "simulation_based_calibration"
PLATE = "simulations"


def simulation_based_calibration(
    model: Program,
    make_guide: Callable[[Program, dict[str, Tensor]], Program],
    *args: Any,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_simulations: int = 200,
    num_samples: int = 200,
    num_steps: int = 1000,
    optim: Any = None,
    loss: Any = None,
    vectorize: bool = True,
    progress_bar: bool = False,
    **kwargs: Any,
) -> Calibration:
    r"""Fit guides to simulated data, and compare their draws with the true latent values.

    .. math::

        z^* \sim p(z), \quad x \sim p(x \mid z^*)
        \quad \Longrightarrow \quad P(z < z^* \mid x) \sim \mathrm{Uniform}(0, 1)

    The true values :math:`z^*` come from the prior, and the data from :math:`p(x \mid z^*)`. The
    fraction of the posterior below :math:`z^*` is then uniform. If a guide is biased, the fractions
    are asymmetric. If a guide is too narrow, they lie near 0 and 1. If a guide is too wide, they
    lie near 1/2.

    Sites of the model that are marked for enumeration, and not in the guide, are drawn given the
    draws of the guide, and ranked like the others.

    An interrupt (Ctrl-C) ends the fits after the current step or draw, with a warning. The result
    uses the draws so far, or with ``vectorize=False`` the simulations that were complete. A second
    interrupt ends the call at once.

    Under a process group of ``torch.distributed``, call the function with the same arguments on
    each rank. The processes divide the simulations, and each returns the same result.

    :param model: the model: a callable with Pyro primitives. Its observations are simulated,
        whatever data its arguments contain. Its parameters keep their values.
    :param make_guide: a function that returns a guide, such as
        ``lambda model, data: AutoNormal(model)``. Its arguments are a model, which observes the
        simulated data, and a dict from site name to the simulated observations. With
        ``vectorize=True``, both have the simulations in a plate to the left of all others. Use
        ``vectorize=False`` for a guide that draws the latent sites of all simulations jointly, such
        as AutoMultivariateNormal.
    :param args: positional arguments of model and guide.
    :param model_args: the same positional arguments as a sequence, instead of ``args``.
    :param model_kwargs: keyword arguments of model and guide whose names clash with arguments of
        this function.
    :param num_simulations: the number R of simulated data sets, >= 10.
    :param num_samples: the number of draws of each guide, >= 1.
    :param num_steps: the number of SVI steps, >= 0; use 0 if the guide needs no training.
    :param optim: a Pyro optimiser. The default is :class:`pyro.optim.ClippedAdam` with a learning
        rate that falls from 0.05 to 0.005.
    :param loss: an ELBO. The default is :class:`pyro.infer.Trace_ELBO`, or
        :class:`pyro.infer.TraceEnum_ELBO` if sites of the model are marked for enumeration.
    :param vectorize: whether to fit all guides at once, instead of one by one.
    :param progress_bar: whether to show a progress bar.
    :param kwargs: further keyword arguments of model and guide.
    :returns: a :class:`Calibration`. The parameter store stays as it was.
    :raises KeyboardInterrupt: after an interrupt (Ctrl-C), if there is nothing to return.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range, if nothing is observed, if a plate is
        subsampled, if there is a factor, or if the guide lacks a latent site or draws it with
        another shape.

    Source: Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
    Inference.

    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
    >>> def make_guide(model, data):
    ...     def guide():
    ...         with pyro.plate("simulations", len(data["x"])):
    ...             pyro.sample("z", dist.Normal(data["x"] / 2, 0.2))
    ...     return guide
    >>> pyro.set_rng_seed(0)
    >>> found = simulation_based_calibration(model, make_guide, num_steps=0)
    >>> bool(found.symmetry_p_values["z"] > 0.01), bool(found.uniformity_p_values["z"] < 0.01)
    (True, True)
    """
    with joint_call(NAME) as call:
        check_integer(NAME, "num_simulations", num_simulations, 10)
        check_integer(NAME, "num_samples", num_samples, 1)
        check_integer(NAME, "num_steps", num_steps, 0)
        check_program(NAME, "model", model)
        optim = optim or pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.1 ** (1 / max(1, num_steps))})
        given = read_programs(NAME, model, make_guide, args, kwargs, model_args, model_kwargs)
        settings = {
            "num_simulations": num_simulations,
            "num_samples": num_samples,
            "num_steps": num_steps,
            "vectorize": vectorize,
        }
        call.check_inputs(given, settings)
        free = _with_fixed_parameters(replace(given, model=free_model(model)))
        call.check_parameters(given)
        call.use_own_random_numbers()
        most = num_simulations if vectorize else 1
        num_steps_in_all = -(-num_simulations // (most * call.size)) * num_steps
        bar = tqdm(total=num_steps_in_all, desc=NAME, disable=not progress_bar or call.rank > 0)
        fits = _Fits(free, make_guide, optim, loss, num_steps, call.interrupts, bar)
        parts: list[dict[str, Tensor]] = []
        done, num_draws = 0, num_samples
        try:
            with bar:
                while done < num_simulations:
                    sizes = call.share(num_simulations - done, most)
                    for found, num_used in call.parts(
                        fits.fractions(size if vectorize else None, num_samples) for size in sizes
                    ):
                        parts.append(found)
                        done += len(next(iter(found.values())))
                        num_draws = min(num_draws, num_used)
        except KeyboardInterrupt:
            if call.interrupts or not parts:  # a second interrupt, or nothing to keep
                raise
            made = [f"{num_draws} of {num_samples} draws"] if vectorize else []
            if not vectorize or done < num_simulations:
                made.append(f"{done} of {num_simulations} simulations")
            warnings.warn(
                f"{NAME} was interrupted. The result uses {' and '.join(made)}.", stacklevel=2
            )
        del bar, fits  # here, because Python ignores an interrupt inside of a destructor
    return tested(_joined(parts))


@dataclass
class _Fits:
    """Fits to simulated data. An interrupt waits for the end of a step or of a draw."""

    programs: Programs
    make_guide: Callable[[Program, dict[str, Tensor]], Program]
    optim: Any
    loss: Any
    num_steps: int
    interrupts: Interrupts
    bar: "tqdm[Any]"

    def fractions(self, size: int | None, num_samples: int) -> tuple[dict[str, Tensor], int]:
        """Simulate, fit a guide, and return the fractions of its draws below the true values.

        :param size: the number of simulations at once. The draws that were made before an interrupt
            are then enough. With None, there is one simulation, without a plate.
        :param num_samples: the number of draws.
        :returns: the fractions, of shape ``(simulations, ...)``, and the number of draws made.
        """
        free = self.programs if size is None else _in_plate(self.programs, size)
        with pyro.get_param_store().scope():
            truth, observations, marked = _simulate(free)
            conditioned = poutine.condition(free.model, data=observations)
            guide = self.make_guide(conditioned, observations)
            loss = self.loss or (TraceEnum_ELBO() if marked else Trace_ELBO())
            svi = SVI(conditioned, guide, self.optim, loss)
            for _ in range(self.num_steps):
                self.interrupts.deliver()
                svi.step(*free.args, **free.kwargs)
                self.bar.update()
            ranks = _Ranks(truth, marked)
            while ranks.num_draws < num_samples:
                if not (size and ranks.num_draws):
                    self.interrupts.deliver()
                elif self.interrupts:
                    break
                ranks.add_draw(replace(free, model=conditioned, guide=guide))
            found = ranks.fractions()
        return found if size else {n: x[None] for n, x in found.items()}, ranks.num_draws


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return the fractions of all simulations as arrays, without masked-out elements."""
    joined = {}
    for name in parts[0]:
        below = torch.cat([part[name] for part in parts])
        below = below.reshape(len(below), -1)
        is_wanted = below.isfinite().all(0)
        if is_wanted.any():
            joined[name] = below[:, is_wanted].squeeze(1).cpu().numpy()
    return joined


def _in_plate(programs: Programs, size: int) -> Programs:
    """Return the programs with the simulations in a plate to the left of all others."""
    model = programs.model
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(model).get_trace(*programs.args, **programs.kwargs)
    stacks = [node.get("cond_indep_stack", ()) for node in trace.nodes.values()]
    depth = max((-(frame.dim or 0) for stack in stacks for frame in stack), default=0)

    def plated(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PLATE, size, dim=-depth - 1):
            return model(*args, **kwargs)

    return replace(programs, model=plated)


def _simulate(programs: Programs) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Return latent values and observations that the model draws, and the sites that are marked."""
    with torch.no_grad():
        trace = poutine.trace(programs.model).get_trace(*programs.args, **programs.kwargs)
        trace.compute_log_prob()
    truth: dict[str, Tensor] = {}
    observations: dict[str, Tensor] = {}
    node: Any
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or is_masked_out(node):
            continue
        if isinstance(node["fn"], Unit):
            raise ValueError(
                f"{NAME}: the model has the factor '{name}', so it cannot be simulated from. "
                "Write it as an observed site with a distribution that can be sampled."
            )
        for frame in node["cond_indep_stack"]:
            if (frame.full_size or frame.size) != frame.size:
                raise ValueError(
                    f"{NAME}: plate '{frame.name}' is subsampled ({frame.size} of "
                    f"{frame.full_size} rows). Use all rows and no subsample_size."
                )
        value = node["value"].detach()
        if node["infer"].get("was_observed"):
            observations[name] = value
        else:
            # Ranks of masked-out elements carry no information about the guide.
            mask = is_unmasked(node)
            mask = mask.reshape(mask.shape + (1,) * node["fn"].event_dim)
            truth[name] = value if mask.all() else value.double().where(mask, math.nan)
    if not observations:
        raise ValueError(f"{NAME}: the model has no observed site. Observe a site with obs=.")
    return truth, observations, {name for name in truth if is_marked(trace.nodes[name])}


def _with_fixed_parameters(programs: Programs) -> Programs:
    """Return the programs with the model's parameters fixed and hidden from optimisers."""
    store = pyro.get_param_store()
    with poutine.block(), torch.no_grad(), store.scope(store.get_state()):
        traced = poutine.trace(programs.model, param_only=True)
        trace: Any = traced.get_trace(*programs.args, **programs.kwargs)
    values = {name: trace.nodes[name]["value"].detach() for name in trace.param_nodes}
    model = poutine.substitute(programs.model, data=values)
    return replace(programs, model=poutine.block(model, hide_types=["param"]))


class _Ranks:
    """The ranks of the true values among the draws of each site.

    :param truth: a dict from site name to the true value.
    :param marked: the sites that are summed out if the guide does not draw them.
    """

    def __init__(self, truth: dict[str, Tensor], marked: set[str]) -> None:
        self._truth = truth
        self._marked = marked
        self._tracer = ParticleTracer(1, is_linear=True)
        self._below = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in truth.items()}
        self._ties = {name: torch.ones_like(count) for name, count in self._below.items()}
        self.num_draws = 0

    @torch.no_grad()
    def add_draw(self, programs: Programs) -> None:
        """Add a draw from the guide, and of the sites that the model sums out."""
        trace = poutine.trace(programs.guide).get_trace(*programs.args, **programs.kwargs)
        if not self._marked <= trace.nodes.keys():
            traces = self._tracer.run(programs)
            trace = latent_draws(traces.guide_traces[0], traces.model_traces[0])
        for name, value in self._truth.items():
            draw = trace.nodes[name]["value"] if name in trace.nodes else None
            if draw is None:
                raise ValueError(
                    f"{NAME}: the guide does not draw site '{name}' of the model. Add it to the "
                    "guide."
                )
            if draw.shape != value.shape:
                raise ValueError(
                    f"{NAME}: the guide draws site '{name}' with shape {tuple(draw.shape)}, but "
                    f"the model draws it with shape {tuple(value.shape)}. Use the model's shape. "
                    f"With vectorize=True, it has the plate '{PLATE}' on the left."
                )
            self._below[name] += draw < value
            self._ties[name] += draw == value
        self.num_draws += 1

    def fractions(self) -> dict[str, Tensor]:
        """Return the fraction of draws below each true value. Ties are broken at random."""
        ranks = {n: x + self._ties[n] * torch.rand_like(x) for n, x in self._below.items()}
        return {
            name: rank.masked_fill(self._truth[name].isnan(), math.nan) / (self.num_draws + 1)
            for name, rank in ranks.items()
        }
