"""Particles of several independent runs, each reweighted and resampled by itself."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ext.infer.annealing.hmc import ChainState
from pyro_ext.infer.annealing.unconstrained import Densities
from pyro_ext.ops import accumulation_dtype


class Cloud(NamedTuple):
    """The particles of R runs with N particles each, at one inverse temperature.

    :ivar state: the positions and densities of all R * N particles, run by run.
    :ivar log_weights: the log weights of shape ``(R, N, *common)``, which sum to 1 in each run.
    :ivar log_z: the estimates of the log evidence so far, of shape ``(R, *common)``.
    :ivar roots: the index of the first ancestor of each particle, of shape ``(R, N, *common)``.
    """

    state: ChainState
    log_weights: Tensor
    log_z: Tensor
    roots: Tensor

    @classmethod
    def of_draws(cls, state: ChainState, num_runs: int) -> "Cloud":
        """Return the cloud of independent draws."""
        log_p = state.densities.log_p
        shape = (num_runs, len(log_p) // num_runs, *log_p.shape[1:])
        zeros = log_p.new_zeros(shape, dtype=accumulation_dtype(log_p.device))
        roots = torch.arange(shape[1], device=log_p.device)
        roots = roots.reshape(-1, *[1] * (log_p.dim() - 1)).expand(shape)
        return cls(state, zeros - math.log(shape[1]), zeros[:, 0], roots)

    @property
    def log_ratio(self) -> Tensor:
        """The log weights log p - log q of the positions, of shape ``(R, N, *common)``."""
        log_w = self.state.densities.log_w.to(self.log_weights.dtype)
        return log_w.reshape(self.log_weights.shape).nan_to_num(nan=-math.inf, neginf=-math.inf)

    @property
    def ess(self) -> Tensor:
        """The effective sample size of each run, of shape ``(R, *common)``."""
        return (-(2 * self.log_weights).logsumexp(1)).exp()

    @property
    def num_ancestors(self) -> Tensor:
        """The number of first ancestors of each run, of shape ``(R, *common)``."""
        return 1 + (self.roots.sort(1).values.diff(dim=1) != 0).sum(1)

    def reweighted(self, step: Tensor) -> "Cloud":
        """Return the cloud at an inverse temperature that is higher by a step.

        :param step: the step of each element of the common plates. Where it is 0, nothing changes.
        """
        log_w = self.log_weights + (step * self.log_ratio).where(step > 0, 0.0)
        total = log_w.logsumexp(1, keepdim=True)
        # A run whose particles all have weight 0 has an evidence of 0.
        even = torch.full_like(log_w, -math.log(log_w.shape[1]))
        normalised = torch.where(total.isneginf(), even, log_w - total)
        return self._replace(log_weights=normalised, log_z=self.log_z + total.squeeze(1))

    def resampled(self, size: int, offset: Tensor | None = None) -> "Cloud":
        """Return a cloud with equal weights, by systematic resampling.

        :param size: the number of particles of a run, after resampling.
        :param offset: the place of the points in [0, 1), of shape ``(R, *common)``; None to draw
            it.
        """
        num_runs, old_size = self.log_weights.shape[:2]
        total = self.log_weights.exp().movedim(1, -1).cumsum(-1)
        # One uniform number a run places the points at equal distances.
        offset = torch.rand_like(total[..., 0]) if offset is None else offset
        points = torch.arange(size, dtype=total.dtype, device=total.device)
        points = (points + offset.unsqueeze(-1)) / size * total[..., -1:]
        index = torch.searchsorted(total, points).clamp(max=old_size - 1).movedim(-1, 1)

        def take(x: Tensor) -> Tensor:
            by_run = x.reshape(num_runs, old_size, *x.shape[1:])
            chosen = index.reshape(*index.shape, *[1] * (by_run.dim() - index.dim()))
            found = by_run.gather(1, chosen.expand(*index.shape, *by_run.shape[index.dim() :]))
            return found.flatten(0, 1)

        densities = Densities(*map(take, self.state.densities))
        log_weights = torch.full_like(self.log_weights[:, :1], -math.log(size))
        return Cloud(
            ChainState(take(self.state.positions), densities),
            log_weights.repeat_interleave(size, 1),
            self.log_z,
            self.roots.gather(1, index),
        )

    def keeping(self, size: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return an offset with which a particle is resampled, and the index of its copy.

        :param size: the number of particles of a run, after resampling.
        :param index: the index of the particle in each run, of shape ``(R, *common)``.

        The copy is one of all ``size`` particles, given that its ancestor is this particle.
        """
        weights, index = self.log_weights.exp(), index.unsqueeze(1)
        ends = weights.cumsum(1)
        end, weight = ends.gather(1, index), weights.gather(1, index)
        point = size * ((end - torch.rand_like(weight) * weight) / ends[:, -1:]).squeeze(1)
        copy = point.long().clamp(0, size - 1)
        return (point - copy).clamp(0, 1), copy

    def replaced(self, state: ChainState, index: Tensor) -> "Cloud":
        """Return a cloud with another particle in each run.

        :param state: the positions and densities of the R particles.
        :param index: their indices, of shape ``(R, *common)``.
        """
        num_runs = len(self.log_z)

        def put(x: Tensor, new: Tensor) -> Tensor:
            by_run = x.reshape(num_runs, -1, *x.shape[1:])
            at = index.reshape(num_runs, 1, *index.shape[1:], *[1] * (new.dim() - index.dim()))
            return by_run.scatter(1, at.expand_as(new.unsqueeze(1)), new.unsqueeze(1)).flatten(0, 1)

        pairs = zip(self.state.densities, state.densities, strict=True)
        densities = Densities(*(put(old, new) for old, new in pairs))
        return self._replace(
            state=ChainState(put(self.state.positions, state.positions), densities)
        )

    def joined(self, states: list[ChainState]) -> "Cloud":
        """Return a cloud of the states of all chains that start at these particles.

        :param states: the states after 0, 1, ... transitions.
        """
        num_runs, length = len(self.log_z), len(states)

        def join(parts: list[Tensor]) -> Tensor:
            by_run = [x.reshape(num_runs, -1, *x.shape[1:]) for x in parts]
            return torch.cat(by_run, 1).flatten(0, 1)

        densities = Densities(
            *map(join, map(list, zip(*(s.densities for s in states), strict=True)))
        )
        repeats = (1, length, *[1] * (self.roots.dim() - 2))
        return Cloud(
            ChainState(join([state.positions for state in states]), densities),
            self.log_weights.repeat(repeats) - math.log(length),
            self.log_z,
            self.roots.repeat(repeats),
        )


def next_step(cloud: Cloud, beta: Tensor, target_ess: float) -> Tensor:
    """Return the steps to the next inverse temperatures, of shape ``common``.

    After a step, the particles of all runs together have the given effective sample size. Those
    whose weights are zero do not count.

    :param cloud: the particles at the current inverse temperatures.
    :param beta: the current inverse temperatures, of shape ``common``.
    :param target_ess: the effective sample size, relative to the number of particles, in (0, 1).

    Source: Zhou, Johansen and Aston (2016), Toward Automatic Model Comparison.
    """
    log_w, ratio = cloud.log_weights.flatten(0, 1), cloud.log_ratio.flatten(0, 1)
    log_w = log_w - math.log(len(cloud.log_z))
    alive = log_w.where(ratio > -math.inf, -math.inf).logsumexp(0)

    def log_ess(step: Tensor) -> Tensor:
        once, twice = log_w + step * ratio, log_w + 2 * step * ratio
        return 2 * once.logsumexp(0) - twice.logsumexp(0) - alive

    rest = (1 - beta).clamp(min=torch.finfo(beta.dtype).tiny)
    low, high = torch.zeros_like(rest), rest
    wanted = math.log(target_ess)
    for _ in range(50):
        middle = (low + high) / 2
        is_small = log_ess(middle) >= wanted
        low, high = torch.where(is_small, middle, low), torch.where(is_small, high, middle)
    return torch.where(log_ess(rest) >= wanted, rest, low).where(beta < 1, 0.0)
