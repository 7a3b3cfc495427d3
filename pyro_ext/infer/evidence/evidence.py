import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ext._deprecated import renamed_arguments
from pyro_ext._figures import axes_or_new
from pyro_ext.infer.evidence.flags import weight_flags
from pyro_ext.ops import MIN_DRAWS


@dataclass(frozen=True)
class EvidenceHistory:
    """The estimates of the log evidence from the first 1, 2, 4, ... draws and from all draws.

    The first dim of each tensor belongs to ``num_samples``. The other dims are as in
    :class:`Evidence`.

    :ivar num_samples: the numbers of draws, in ascending order.
    :ivar log_evidence: the estimates, in nats.
    :ivar std_error: their standard errors, in nats.
    :ivar jackknife: a dict from the order to the jackknife estimates, in nats.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import estimate_evidence
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
    >>> estimate_evidence(model, num_samples=10).history.num_samples
    (1, 2, 4, 8, 10)
    """

    num_samples: tuple[int, ...]
    log_evidence: Tensor
    std_error: Tensor
    jackknife: dict[int, Tensor]


@dataclass(frozen=True)
class Evidence:
    """An importance-sampling estimate of the log evidence, with diagnostics of its reliability.

    A common plate encloses every site that depends on a draw. Every tensor is in float64 and has
    one entry for each element of the common plates. For a variational autoencoder, there is one
    entry for each data point. Without a common plate, tensors have no dims. An evidence prints as a
    table.

    :ivar log_evidence: the estimate of log p(x), in nats. Its bias is negative and about half the
        square of the standard error.
    :ivar std_error: the standard error of ``log_evidence``, by the delta method; NaN for one draw.
    :ivar ess: the effective sample size, between 1 and ``num_samples``.
    :ivar pareto_k: the Pareto shape of the largest weights. If it is above 0.7, do not trust the
        estimate.
    :ivar jackknife: a dict from the order to the jackknife estimate, in nats. If there are at most
        1,024 draws, the jackknife leaves out one draw at a time. If there are more, it groups the
        draws into 512 to 1,024 blocks and leaves out one block mean at a time. An estimate is NaN
        if there are too few draws or blocks.
    :ivar outer: the log-probability of observed and factor sites outside the common plates, in
        nats. These sites do not depend on any latent site. The total is
        ``log_evidence.sum() + outer``. Without common plates these sites are already part of
        ``log_evidence``, and ``outer`` is zero.
    :ivar num_samples: the number of draws. If the number differs between data points, the smallest
        is given.
    :ivar plates: the names of the plates to which the dims belong.
    :ivar history: the estimates from the first 1, 2, 4, ... draws, as an :class:`EvidenceHistory`.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import estimate_evidence
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> evidence = estimate_evidence(model, None, torch.zeros(3))
    >>> evidence.plates, evidence.log_evidence.shape, evidence.num_samples
    (('data',), torch.Size([3]), 1000)
    """

    log_evidence: Tensor
    std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    jackknife: dict[int, Tensor]
    outer: float
    num_samples: int
    plates: tuple[str, ...]
    history: EvidenceHistory

    @property
    def total(self) -> float:
        """The log evidence of all data points together, including ``outer``, in nats."""
        return self.log_evidence.sum().item() + self.outer

    @property
    def total_std_error(self) -> float:
        """The standard error of :attr:`total`, in nats.

        The draws of different data points are independent.
        """
        return self.std_error.square().sum().sqrt().item()

    @property
    def flags(self) -> dict[str, str]:
        """Reasons not to trust the estimate, by a short name; empty if none is known."""
        return weight_flags(self)

    def bits_per_dim(self, num_dims: int) -> Tensor:
        """Return the negative log evidence in bits per dimension of a data point.

        :param num_dims: the number of dimensions >= 1, such as height x width x channels.
        :returns: a tensor of the shape of ``log_evidence``.
        :raises ValueError: if ``num_dims`` is not positive.
        """
        return -self.log_evidence * _bits_per_nat(num_dims)

    def bits_per_dim_std_error(self, num_dims: int) -> Tensor:
        """Return the standard error of :meth:`bits_per_dim`.

        :param num_dims: the number of dimensions >= 1, such as height x width x channels.
        :returns: a tensor of the shape of ``std_error``.
        :raises ValueError: if ``num_dims`` is not positive.
        """
        return self.std_error * _bits_per_nat(num_dims)

    def to_dataset(self) -> Any:
        """Return an :class:`xarray.Dataset` with the plates as dimensions.

        It holds ``log_evidence``, ``std_error``, ``ess``, ``pareto_k`` and ``jackknife``. It also
        holds ``history_log_evidence``, ``history_std_error`` and ``history_jackknife``. The
        jackknife estimates have the extra dim ``order``, and the histories have the extra dim
        ``num_samples``. The attributes of the dataset are ``total``, ``total_std_error``, ``outer``
        and ``num_samples``.
        """
        import xarray as xr

        orders = list(self.jackknife)
        taken = {"order", "num_samples", "log_evidence", "std_error", "ess", "pareto_k"}
        plates = tuple(f"{name}_plate" if name in taken else name for name in self.plates)
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            name: (plates, getattr(self, name).cpu().numpy())
            for name in ("log_evidence", "std_error", "ess", "pareto_k")
        }
        along = ("num_samples", *plates)
        for name in ("log_evidence", "std_error"):
            variables[f"history_{name}"] = (along, getattr(self.history, name).cpu().numpy())
        for name, dims, estimates in (
            ("jackknife", plates, self.jackknife),
            ("history_jackknife", along, self.history.jackknife),
        ):
            if orders:
                stacked = torch.stack([estimates[order] for order in orders])
                variables[name] = (("order", *dims), stacked.cpu().numpy())
        coordinates = {"num_samples": list(self.history.num_samples)}
        attributes = {
            name: getattr(self, name)
            for name in ("total", "total_std_error", "outer", "num_samples")
        }
        if orders:
            coordinates["order"] = orders
        return xr.Dataset(variables, coordinates, attributes)

    @renamed_arguments(axes="ax")
    def plot(self, ax: Any = None) -> Any:
        """Plot the mean log evidence and the jackknife estimates against the number of draws.

        The band has a width of two standard errors on each side. This needs matplotlib.

        :param ax: the matplotlib axes; None for new axes.
        :returns: the axes.
        """
        ax = axes_or_new(ax)
        history, n = self.history, self.log_evidence.numel()
        sizes = list(history.num_samples)
        mean = history.log_evidence.reshape(len(sizes), -1).mean(1).cpu().numpy()
        error = history.std_error.reshape(len(sizes), -1).square().sum(1).sqrt().cpu().numpy() / n
        (line,) = ax.plot(sizes, mean, marker="o", markersize=3, label="log mean weight")
        ax.fill_between(
            sizes, mean - 2 * error, mean + 2 * error, alpha=0.2, color=line.get_color()
        )
        for order, estimates in history.jackknife.items():
            if order > 0:
                by_size = estimates.reshape(len(sizes), -1).mean(1).cpu().numpy()
                ax.plot(sizes, by_size, marker=".", linestyle="--", label=f"jackknife {order}")
        what = f"mean log evidence of {n} data points" if self.plates else "log evidence"
        ax.set(xscale="log", xlabel="draws", ylabel=f"{what}, nats")
        ax.legend()
        return ax

    @renamed_arguments(axes="ax")
    def plot_pareto_k(self, ax: Any = None) -> Any:
        """Plot the Pareto k of each data point, with a line at 0.7.

        Do not trust the estimates above the line. This needs matplotlib.

        :param ax: the matplotlib axes; None for new axes.
        :returns: the axes.
        """
        ax = axes_or_new(ax)
        pareto_k = self.pareto_k.flatten().cpu().numpy()
        is_heavy = pareto_k > 0.7
        index = np.arange(len(pareto_k))
        for chosen, color in ((~is_heavy, "C0"), (is_heavy, "C3")):
            ax.scatter(index[chosen], pareto_k[chosen], s=12, color=color)
        ax.axhline(0.7, color="black", linewidth=0.8, linestyle="--")
        title = f"{is_heavy.sum()} of {len(pareto_k)} above 0.7"
        if self.num_samples < MIN_DRAWS:
            title = f"needs {MIN_DRAWS} draws"
        ax.set(xlabel="data point", ylabel="Pareto k", title=title)
        return ax

    def __repr__(self) -> str:
        n = self.log_evidence.numel()
        mean_error = self.std_error.square().sum().sqrt() / n
        what = f"mean of {n} data points" if self.log_evidence.dim() else "joint"
        lines = [
            f"{type(self).__name__}({what}, {self.num_samples} draws)",
            f"  log evidence   {self.log_evidence.mean():.4f} +- {mean_error:.4f} nats",
            *(
                f"  jackknife {order}    {estimate.mean():.4f}"
                for order, estimate in self.jackknife.items()
            ),
            f"  ess            {self.ess.mean():.1f} (smallest {self.ess.min():.1f})",
        ]
        if self.num_samples < MIN_DRAWS:
            lines.append(f"  Pareto k       needs {MIN_DRAWS} draws")
        else:
            lines.append(
                f"  Pareto k       {self.pareto_k.median():.2f} "
                f"(median; above 0.7: {(self.pareto_k > 0.7).sum()} of {n})"
            )
        if self.log_evidence.dim():
            lines.append(f"  total          {self.total:.4f} +- {self.total_std_error:.4f} nats")
        lines += [f"  flag           {name}: {reason}" for name, reason in self.flags.items()]
        if self.outer:
            lines.append(f"  outer          {self.outer:.4f} (once, beside the data points)")
        return "\n".join(lines)


def concatenate(parts: Sequence[Evidence], dim: int) -> Evidence:
    """Return the evidence of several blocks of data points as one.

    :param parts: the evidence of each block.
    :param dim: the dim along which the blocks lie.
    """
    if len(parts) == 1:
        return parts[0]
    sizes = sorted({size for part in parts for size in part.history.num_samples})
    histories = [_at_sizes(part.history, sizes) for part in parts]
    orders = parts[0].jackknife

    def join(values: list[Tensor], dim: int = dim) -> Tensor:
        return torch.cat(values, dim)

    return Evidence(
        log_evidence=join([part.log_evidence for part in parts]),
        std_error=join([part.std_error for part in parts]),
        ess=join([part.ess for part in parts]),
        pareto_k=join([part.pareto_k for part in parts]),
        jackknife={order: join([part.jackknife[order] for part in parts]) for order in orders},
        outer=sum(part.outer for part in parts),
        num_samples=min(part.num_samples for part in parts),
        plates=parts[0].plates,
        history=EvidenceHistory(
            num_samples=tuple(sizes),
            log_evidence=join([h.log_evidence for h in histories], dim + 1),
            std_error=join([h.std_error for h in histories], dim + 1),
            jackknife={
                order: join([h.jackknife[order] for h in histories], dim + 1) for order in orders
            },
        ),
    )


def _bits_per_nat(num_dims: int) -> float:
    if num_dims < 1:
        raise ValueError(f"bits_per_dim: num_dims must be at least 1, but it is {num_dims}.")
    return 1 / (num_dims * math.log(2))


def _at_sizes(history: EvidenceHistory, sizes: Sequence[int]) -> EvidenceHistory:
    """Return a history at other numbers of draws.

    Each entry is the last one of the history with no more draws.
    """
    own = torch.tensor(history.num_samples)
    index = torch.searchsorted(own, torch.tensor(sizes), right=True) - 1
    index = index.to(history.log_evidence.device)
    return EvidenceHistory(
        num_samples=tuple(sizes),
        log_evidence=history.log_evidence[index],
        std_error=history.std_error[index],
        jackknife={order: values[index] for order, values in history.jackknife.items()},
    )
