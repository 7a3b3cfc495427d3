"""A recorder of sample sites, which also checks the guide against the model."""

import math
import numbers
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._arguments import abbreviate
from pyro_ext._private.of_pyro import HANDLER_STACK, mask_of
from pyro_ext.tracing.sites import SiteError, global_site_error, has_dim, has_particles, is_delta


class SiteRecord(NamedTuple):
    """The properties of a sample site that are known only while the program runs."""

    fn: Any
    value: Any
    mask: Any
    has_particle_dim: bool
    is_observed: bool
    is_auxiliary: bool
    plate_sizes: dict[str, int | None]
    user_scales: tuple[Any, ...]


class SiteRecorder(Messenger):
    """A handler that records each sample site and checks that guide and model match.

    It records a site before the particle plate expands it, so install it innermost. There is one
    recorder for the guide and one for the model. The recorder of the model raises an error at the
    first site that does not match, where Pyro would only warn.

    :param particle_dim: the dim of the particle plate, negative; None if there is no such plate.
    :param guide: for the model, the recorder of the guide against which it is replayed; for the
        guide, None.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    """

    def __init__(
        self,
        particle_dim: int | None,
        guide: "SiteRecorder | None" = None,
        local_plate: str | None = None,
    ) -> None:
        super().__init__()
        self.particle_dim = particle_dim
        self.guide = guide
        self.local_plate = local_plate
        self.sites: dict[str, SiteRecord] = {}
        self._has_latent = False

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        name, infer = str(msg["name"]), msg["infer"] or {}
        if infer.get("enumerate") and not msg["is_observed"]:
            raise SiteError(
                f"Site '{name}' is marked for enumeration, which multi-sample estimators do not "
                "support. Remove infer={'enumerate': ...} or config_enumerate, or use "
                "pyro.infer.TraceEnum_ELBO."
            )
        if not msg["is_observed"] and not self._has_latent and self.particle_dim is not None:
            self._raise_for_batch_dim_without_plate(msg)
            self._has_latent = True
        self.sites[name] = SiteRecord(
            fn=msg["fn"],
            value=msg["value"],
            mask=msg["mask"],
            has_particle_dim=self._has_particle_dim(msg),
            is_observed=msg["is_observed"],
            is_auxiliary=bool(infer.get("is_auxiliary") or infer.get("_deterministic")),
            plate_sizes={f.name: f.full_size for f in msg["cond_indep_stack"] if f.vectorized},
            user_scales=_user_scales(),
        )
        if self.guide is not None:
            self._check_against_guide(name, self.guide.sites.get(name))
        is_global = not has_particles(msg, self.local_plate)
        if is_global and self.particle_dim is not None and self.sites[name].has_particle_dim:
            raise global_site_error("guide" if self.guide is None else "model", name)

    def _has_particle_dim(self, msg: Any) -> bool:
        if self.particle_dim is None:
            return True
        event_dim = getattr(msg["fn"], "event_dim", 0)
        shapes = [getattr(msg["fn"], "batch_shape", ())]
        if isinstance(msg["value"], Tensor):
            shapes.append(msg["value"].shape[: msg["value"].dim() - event_dim])
        shapes += [x.shape for x in (msg["mask"], msg["scale"]) if isinstance(x, Tensor)]
        return any(has_dim(shape, self.particle_dim) for shape in shapes)

    def _raise_for_batch_dim_without_plate(self, msg: Any) -> None:
        # Nothing is drawn before the first latent site, so its dims cannot come from particles.
        if self._has_particle_dim(msg):
            raise SiteError(
                f"Site '{msg['name']}' has batch shape {tuple(msg['fn'].batch_shape)}, with a size "
                f"other than 1 at dim {self.particle_dim}, which is the dim of the particles. Put "
                "its batch dims in plates that max_plate_nesting counts, or in .to_event(...)."
            )

    def _check_against_guide(self, name: str, in_guide: SiteRecord | None) -> None:
        record = self.sites[name]
        if in_guide is None:
            if not record.is_observed:
                raise SiteError(
                    f"Latent site '{name}' of the model is missing from the guide. Add "
                    f"pyro.sample('{name}', ...) to the guide."
                )
        elif record.is_observed and not in_guide.is_observed:
            raise SiteError(
                f"Site '{name}' is observed in the model but sampled in the guide. Remove it from "
                "the guide, which may sample latent sites only."
            )
        elif record.plate_sizes != in_guide.plate_sizes:
            raise SiteError(
                f"Site '{name}' is in the plates (name: size) {in_guide.plate_sizes} in the guide, "
                f"but in {record.plate_sizes} in the model. Put it in the same plates in both."
            )
        elif _is_masked(record) and not _is_masked(in_guide) and not is_delta(in_guide.fn):
            warnings.warn(
                f"Site '{name}' is masked in the model but not in the guide. The weights include "
                "its log q where its log p is masked out. Use the same mask in both.",
                stacklevel=2,
            )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and self.guide is not None:
            for name, record in self.guide.sites.items():
                if name not in self.sites and not record.is_auxiliary:
                    raise SiteError(
                        f"Site '{name}' of the guide is missing from the model, which has the "
                        f"sites {abbreviate(sorted(self.sites))}. Add a latent site of that name "
                        "to the model. Only if the latent sites are deterministic functions of "
                        "it, mark it with infer={'is_auxiliary': True} instead."
                    )


def _is_masked(record: SiteRecord) -> bool:
    """Return whether a latent site is partly masked.

    The mask is read only if validation is enabled. Otherwise the result is False.
    """
    masks = (record.mask, mask_of(record.fn))
    tensors = [mask for mask in masks if isinstance(mask, Tensor)]
    if record.is_observed or not is_validation_enabled():
        return False
    return any(not bool(mask.all()) for mask in tensors)


def _user_scales() -> tuple[Any, ...]:
    """Return the scales of the enclosing ``poutine.scale`` handlers.

    The first is the product of all scales that are numbers; the tensors follow.
    """
    scales = [handler.scale for handler in HANDLER_STACK if isinstance(handler, ScaleMessenger)]
    number = math.prod(scale for scale in scales if isinstance(scale, numbers.Number))
    tensors = [scale for scale in scales if not isinstance(scale, numbers.Number)]
    return (number, *tensors) if scales else ()


def raise_for_handlers_of_linear_objectives() -> None:
    """Raise a ValueError if an active handler makes separate draws for each data point."""
    for handler in HANDLER_STACK:
        if getattr(handler, "needs_linear_objective", False):
            raise ValueError(
                f"{type(handler).__name__} requires an ELBO with num_particles=1. Any other "
                "objective is not linear, and needs the weights that were drawn. Use "
                f"num_particles=1, or leave out {type(handler).__name__}."
            )
