"""A recorder of sample sites, which also checks the guide against the model."""

import math
import numbers
from types import TracebackType
from typing import Any, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._arguments import abbreviate
from pyro_ext._private.of_pyro import HANDLER_STACK, mask_of
from pyro_ext.tracing.advice import Advice
from pyro_ext.tracing.enumeration import NeedsEnumerationError, is_marked
from pyro_ext.tracing.plate_sizes import UNKNOWN
from pyro_ext.tracing.sites import (
    EnumeratedGuideError,
    SiteError,
    global_site_error,
    has_dim,
    has_particles,
    is_delta,
    is_deterministic,
    is_left_by_do,
    is_untraced,
)


class SiteRecord(NamedTuple):
    """The properties of a sample site that are known only while the program runs."""

    fn: Any
    value: Any
    mask: Any
    has_particle_dim: bool
    is_observed: bool
    is_auxiliary: bool
    plates: dict[str, Any]
    user_scales: tuple[Any, ...]


class SiteRecorder(Messenger):
    """A handler that records each sample site and checks that guide and model match.

    It records a site before the particle plate expands it, so install it innermost. There is one
    recorder for the guide and one for the model. The recorder of the model raises an error at the
    first site that does not match, where Pyro would only warn.

    :param particle_dim: the dim of the particle plate, negative; None if there is no such plate.
    :param advice: the advice of error messages.
    :param guide: for the model, the recorder of the guide against which it is replayed; for the
        guide, None.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    :param enumerates: whether a handler enumerates the marked sites of the model.
    """

    def __init__(
        self,
        particle_dim: int | None,
        advice: Advice,
        guide: "SiteRecorder | None" = None,
        local_plate: str | None = None,
        enumerates: bool = False,
    ) -> None:
        super().__init__()
        self.enumerates = enumerates
        self.particle_dim = particle_dim
        self.advice = advice
        self.guide = guide
        self.local_plate = local_plate
        self.sites: dict[str, SiteRecord] = {}
        self._has_latent = False
        self._rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self._rows[str(msg["name"])] = msg["value"]
            return
        if is_untraced(msg):
            self._has_latent = True
            return
        if self._is_cut_off(msg):
            msg["mask"] = False  # no other site depends on it, so its density means nothing
            return
        name, infer = str(msg["name"]), msg["infer"] or {}
        is_summed_out = is_marked(msg) and self._is_summed_out(name)
        if not msg["is_observed"] and not self._has_latent and self.particle_dim is not None:
            self._raise_for_batch_dim_without_plate(msg)
            self._has_latent = True
        self.sites[name] = SiteRecord(
            fn=msg["fn"],
            value=msg["value"],
            mask=msg["mask"],
            has_particle_dim=self._has_particle_dim(msg),
            is_observed=msg["is_observed"] or is_summed_out,
            is_auxiliary=bool(infer.get("is_auxiliary")) or is_deterministic(msg),
            plates={f.name: f for f in msg["cond_indep_stack"] if f.vectorized},
            user_scales=_user_scales(),
        )
        if self.guide is not None:
            self._check_against_guide(name, self.guide.sites.get(name))
        is_global = not has_particles(msg, self.local_plate)
        if is_global and self.particle_dim is not None and self.sites[name].has_particle_dim:
            raise global_site_error("guide" if self.guide is None else "model", name)

    def _is_summed_out(self, name: str) -> bool:
        """Return whether a marked site is summed out, and not drawn by the guide."""
        if self.guide is None:
            raise EnumeratedGuideError(
                f"Site '{name}' of the guide is marked for enumeration. A bound of several "
                f"particles has no exact sum over draws of the guide. {self.advice.enumeration}"
            )
        if name in self.guide.sites:
            return False
        if not self.enumerates:
            raise NeedsEnumerationError
        return True

    def _is_cut_off(self, msg: Any) -> bool:
        """Return whether a latent site of the model, without a guide, is left by poutine.do."""
        if self.guide is None or msg["is_observed"] or msg["name"] in self.guide.sites:
            return False
        return is_left_by_do(msg)

    def _pyro_post_sample(self, msg: Message) -> None:
        if self.guide is None or not site_is_subsample(msg):
            return
        own, name = self._rows.pop(str(msg["name"]), None), msg["name"]
        if own is None or own is msg["value"]:
            return
        in_plate = [site for site, record in self.guide.sites.items() if name in record.plates]
        if not in_plate:
            msg["value"] = own  # the rows of the guide's plate are of no use
        elif is_validation_enabled() and not _has_same_rows(own, msg["value"]):
            raise SiteError(
                f"Plate '{name}' has other rows in the guide than in the model, which passes it "
                "subsample=. Pass the same subsample to the guide's plate. Pass an automatic guide "
                "create_plates, a function that returns the plate with this subsample."
            )

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
        elif not _fit(record.plates, in_guide.plates):
            raise SiteError(
                f"Site '{name}' is in the plates (name: size) {_sizes(in_guide.plates)} in the "
                f"guide, but in {_sizes(record.plates)} in the model. "
                f"{_plate_advice(record.plates, in_guide.plates)}"
            )
        elif not self._is_point(in_guide) and _masks_differ(record, in_guide):
            raise SiteError(
                f"Latent site '{name}' has another mask in the guide than in the model. The "
                "weights would have its log q without its log p, or the reverse. "
                f"{_mask_advice(name, in_guide)}"
            )

    @property
    def _latent_names(self) -> list[str]:
        return sorted(name for name, record in self.sites.items() if not record.is_observed)

    def _is_point(self, in_guide: SiteRecord) -> bool:
        """Return whether a guide site is a Delta that is no function of auxiliary draws."""
        others: Any = self.guide.sites.values() if self.guide else ()
        return is_delta(in_guide.fn) and not any(
            other.is_auxiliary and not other.is_observed and not is_delta(other.fn)
            for other in others
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
                        f"Site '{name}' of the guide is missing from the model, whose latent sites "
                        f"are {abbreviate(self._latent_names)}. Remove or rename it in the guide, "
                        "or add it to the model. Only if the latent sites are deterministic "
                        "functions of it, mark it with infer={'is_auxiliary': True} instead."
                    )


def _sizes(plates: dict[str, Any]) -> dict[str, int]:
    return {name: frame.full_size for name, frame in plates.items()}


def _plate_advice(in_model: dict[str, Any], in_guide: dict[str, Any]) -> str:
    if in_model.keys() != in_guide.keys():
        return "Put it in the same plates in both."
    return (
        "An automatic guide has the plates of its first run, and parameters for each of its rows. "
        "Pass the same rows, or fit a new guide."
    )


def _mask_advice(name: str, in_guide: SiteRecord) -> str:
    if name.endswith("_unobserved"):
        return (
            "The mask comes from obs_mask=. If you do not need the imputed values, put the "
            "observed site under poutine.mask instead. Otherwise draw this site in a guide by "
            "hand, under the same mask."
        )
    if is_delta(in_guide.fn):
        return "An automatic guide has no masks. Draw this site by hand, under the same mask."
    return "Draw the site in the guide under the same poutine.mask."


def _fit(in_model: dict[str, Any], in_guide: dict[str, Any]) -> bool:
    """Return whether the plates of a site are the same in model and guide.

    A plate without a size fits any plate of its name.

    :raises SiteError: if such a plate of the guide is subsampled in the model.
    """
    for name, frame in in_model.items():
        if name in in_guide and in_guide[name].size == UNKNOWN and frame.size != frame.full_size:
            raise SiteError(
                f"Plate '{name}' has no size in the guide, but it is subsampled in the model "
                f"({frame.size} of {frame.full_size}). Without a size, log q is not scaled. Give "
                "the guide's plate the size and the subsample size of the model's plate."
            )
    return in_model.keys() == in_guide.keys() and all(
        UNKNOWN in (frame.size, in_guide[name].size) or frame.full_size == in_guide[name].full_size
        for name, frame in in_model.items()
    )


def _masks_differ(record: SiteRecord, in_guide: SiteRecord) -> bool:
    """Return whether a latent site has different masks in model and guide.

    The masks are read only if validation is enabled. Otherwise the result is False.
    """
    if record.is_observed or not is_validation_enabled():
        return False
    in_model, of_guide = _mask(record), _mask(in_guide)
    if not torch.as_tensor(in_model).any():
        return False  # an improper prior, which is flat
    return not bool((torch.as_tensor(in_model) == torch.as_tensor(of_guide)).all())


def _has_same_rows(rows: Any, others: Any) -> bool:
    if len(rows) != len(others):
        return False
    x, y = torch.as_tensor(rows), torch.as_tensor(others)
    return torch.allclose(x, y.to(x.dtype), 0, 0, equal_nan=True)  # rows of data may be NaN


def _mask(record: SiteRecord) -> Any:
    """Return the product of the masks of a site; True if it has none."""
    mask: Any = True
    for part in (record.mask, mask_of(record.fn)):
        mask = mask if part is None else mask & part
    return mask


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
