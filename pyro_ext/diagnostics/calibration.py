import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import SVI, Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.diagnostics.site_arrays import is_unmasked
from pyro_ext.infer.arguments import check_integer
from pyro_ext.infer.handlers import is_masked_out

NAME = "simulation_based_calibration"
PLATE = "simulations"


@dataclass(frozen=True)
class Calibration:
    """Where the truth lay among the draws of guides that were fitted to simulated data.

    :ivar probabilities: by latent site, the fraction of draws below the truth, ``(R, *shape)``:
        uniform for guides that are right.
    :ivar symmetry_p_values: by latent site, of a Wilcoxon signed-rank test that the fractions are
        symmetric about 1/2: small where the guide is biased.
    :ivar uniformity_p_values: likewise, of a Kolmogorov-Smirnov test that the distances of the
        fractions from 1/2 are uniform: small where the guide is too narrow or too wide.
    """

    probabilities: dict[str, np.ndarray]
    symmetry_p_values: dict[str, np.ndarray]
    uniformity_p_values: dict[str, np.ndarray]

    def __repr__(self) -> str:
        R = len(next(iter(self.probabilities.values())))
        lines = [f"Calibration({R} simulations)"]
        for name, fractions in self.probabilities.items():
            bias = self._verdict(self.symmetry_p_values[name], "biased", "unbiased")
            outside = np.abs(fractions - 0.5).mean()
            direction = "too narrow" if outside > 0.25 else "too wide"
            spread = self._verdict(self.uniformity_p_values[name], direction, "of the right width")
            lines.append(f"  {name:12} {bias}; {spread}")
        return "\n".join(lines)

    @staticmethod
    def _verdict(p_values: np.ndarray, bad: str, good: str) -> str:
        # The smallest of n p-values, by Bonferroni.
        smallest = min(1.0, float(p_values.min()) * p_values.size)
        return f"{bad if smallest < 0.01 else good} (p {smallest:.2g})"

    def plot(self, axes: Any = None) -> Any:
        """Draws a histogram of the fractions for each site, with the band of 99 % if uniform.

        Needs matplotlib.

        :param axes: an array of matplotlib axes, one for each site; None for new ones.
        :returns: the array.
        """
        import matplotlib.pyplot as plt
        from scipy import stats

        if axes is None:
            size = len(self.probabilities)
            axes = plt.subplots(1, size, squeeze=False, layout="constrained")[1][0]
        for axis, (name, fractions) in zip(np.ravel(axes), self.probabilities.items(), strict=True):
            values = fractions.reshape(-1)
            num_bins = min(20, max(5, len(values) // 20))
            axis.hist(values, bins=num_bins, range=(0, 1))
            low, high = stats.binom.interval(0.99, len(values), 1 / num_bins)
            axis.axhspan(low, high, color="black", alpha=0.15)
            axis.set(title=name, xlabel="fraction of draws below the truth")
        return axes


def simulation_based_calibration(
    model: Callable,
    make_guide: Callable[[Callable, dict[str, Tensor]], Callable],
    *,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_simulations: int = 200,
    num_samples: int = 200,
    num_steps: int = 1000,
    optim: Any = None,
    loss: Any = None,
    vectorize: bool = True,
    progress_bar: bool = False,
) -> Calibration:
    r"""Fits guides to data that the model simulates, and looks where the truth lies.

    If latent values :math:`z^*` come from the prior and data from :math:`p(x \mid z^*)`, then the
    fraction of the posterior below :math:`z^*` is uniform. A guide that is biased makes the
    fractions asymmetric; one that is too narrow puts them at both ends, one that is too wide in
    the middle.

    Source: Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
    Inference.

    :param model: the model; what it observes is simulated, for any data in its arguments. Its
        parameters stay as they are.
    :param make_guide: makes a guide from a model, which observes what was simulated, and the
        simulated observations by site: ``lambda model, data: AutoNormal(model)``. When vectorised,
        both have the simulations in a plate to the left of all others; a guide that draws the
        latent sites of all simulations jointly, such as AutoMultivariateNormal, wants
        ``vectorize=False``.
    :param model_args: positional arguments of model and guide.
    :param model_kwargs: keyword arguments of both.
    :param int num_simulations: the number R of data sets, 10 or more.
    :param int num_samples: draws of each guide.
    :param int num_steps: steps of SVI; 0 if the guide needs none.
    :param optim: a Pyro optimiser; :class:`pyro.optim.ClippedAdam` by default, whose learning rate
        falls from 0.05 to 0.005.
    :param loss: an ELBO; :class:`pyro.infer.Trace_ELBO` by default.
    :param bool vectorize: whether the guides are fitted all at once, rather than one by one.
    :param bool progress_bar: whether to show one.
    :returns: a :class:`Calibration`. The parameter store is left as it was.
    :raises ValueError: if an argument is out of range, if nothing is observed, if a plate is
        subsampled or there is a factor, or if a latent site is missing from the guide or has
        another shape there.

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
    for name, value, minimum in (
        ("num_simulations", num_simulations, 10),
        ("num_samples", num_samples, 1),
        ("num_steps", num_steps, 0),
    ):
        check_integer(NAME, name, value, minimum)
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    optim = optim or pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.1 ** (1 / max(1, num_steps))})
    loss = loss or Trace_ELBO()
    free = _with_fixed_parameters(poutine.uncondition(model), args, kwargs)
    num_fits = num_simulations
    if vectorize:
        free, num_fits = _in_plate(free, num_simulations, args, kwargs), 1
    ranks: dict[str, list[Tensor]] = {}  # draws below the truth, ties broken at random
    with tqdm(total=num_fits * num_steps, desc=NAME, disable=not progress_bar) as bar:
        for _ in range(num_fits):
            with pyro.get_param_store().scope():
                truth, observations = _simulate(free, args, kwargs)
                conditioned = poutine.condition(free, data=observations)
                guide = make_guide(conditioned, observations)
                svi = SVI(conditioned, guide, optim, loss)
                for _ in range(num_steps):
                    svi.step(*args, **kwargs)
                    bar.update()
                for name, below in _ranks(guide, truth, num_samples, args, kwargs).items():
                    ranks.setdefault(name, []).append(below if vectorize else below[None])
    fractions = {}
    for name, parts in ranks.items():
        below = torch.cat(parts).reshape(num_simulations, -1)
        is_wanted = below.isfinite().all(0)
        if is_wanted.any():
            fraction = below[:, is_wanted] / (num_samples + 1)
            fractions[name] = fraction.squeeze(1).cpu().numpy()
    return _tested(fractions)


def _in_plate(
    model: Callable, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable:
    """The model with its simulations in a plate to the left of all others."""
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    stacks = [node.get("cond_indep_stack", ()) for node in trace.nodes.values()]
    depth = max((-(frame.dim or 0) for stack in stacks for frame in stack), default=0)

    def plated(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PLATE, size, dim=-depth - 1):
            return model(*args, **kwargs)

    return plated


def _simulate(
    model: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latent values and observations that the model draws."""
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    truth: dict[str, Tensor] = {}
    observations: dict[str, Tensor] = {}
    node: Any
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or is_masked_out(node):
            continue
        if isinstance(node["fn"], Unit):
            raise ValueError(
                f"{NAME}: expected a model that can be simulated from, got the factor '{name}'."
            )
        for frame in node["cond_indep_stack"]:
            if (frame.full_size or frame.size) != frame.size:
                raise ValueError(
                    f"{NAME}: expected plates without subsampling, got '{frame.name}' with "
                    f"{frame.size} of {frame.full_size} rows."
                )
        value = node["value"].detach()
        if node["infer"].get("was_observed"):
            observations[name] = value
        else:
            # What is masked out says nothing of the guide.
            mask, _ = is_unmasked(node)
            mask = mask.reshape(mask.shape + (1,) * node["fn"].event_dim)
            truth[name] = value if mask.all() else value.double().where(mask, math.nan)
    if not observations:
        raise ValueError(f"{NAME}: expected an observed site in the model, got none.")
    return truth, observations


def _with_fixed_parameters(
    model: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable:
    """The model with its parameters as they are, hidden from optimisers."""
    store = pyro.get_param_store()
    with poutine.block(), torch.no_grad(), store.scope(store.get_state()):
        trace: Any = poutine.trace(model, param_only=True).get_trace(*args, **kwargs)
    values = {
        name: node["value"].detach()
        for name, node in trace.nodes.items()
        if node["type"] == "param"
    }
    return poutine.block(poutine.substitute(model, data=values), hide_types=["param"])


def _ranks(
    guide: Callable,
    truth: dict[str, Tensor],
    num_samples: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Tensor]:
    """The rank of the truth among the draws of each site, ties broken at random."""
    below = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in truth.items()}
    ties = {name: torch.ones_like(count) for name, count in below.items()}
    with torch.no_grad():
        for _ in range(num_samples):
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
            for name, value in truth.items():
                draw = trace.nodes[name]["value"] if name in trace.nodes else None
                if draw is None or draw.shape != value.shape:
                    found = "no such site" if draw is None else f"shape {tuple(draw.shape)}"
                    raise ValueError(
                        f"{NAME}: expected the guide to draw site '{name}' with shape "
                        f"{tuple(value.shape)}, got {found}."
                    )
                below[name] += draw < value
                ties[name] += draw == value
    return {
        name: (count + ties[name] * torch.rand_like(count)).masked_fill(
            truth[name].isnan(), math.nan
        )
        for name, count in below.items()
    }


def _tested(fractions: dict[str, np.ndarray]) -> Calibration:
    from scipy import stats

    symmetry, uniformity = {}, {}
    for name, values in fractions.items():
        columns = values.reshape(len(values), -1).T
        symmetry[name] = np.array([stats.wilcoxon(c - 0.5).pvalue for c in columns])
        uniformity[name] = np.array(
            [stats.kstest(np.abs(2 * c - 1), "uniform").pvalue for c in columns]
        )
    return Calibration(fractions, symmetry, uniformity)
