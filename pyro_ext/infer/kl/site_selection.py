"""The choice of the latent sites whose KL terms are weighted."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_ext._arguments import abbreviate, describe
from pyro_ext._random_states import kept_random_states
from pyro_ext.tracing import Programs
from pyro_ext.tracing.sites import is_delta, is_masked_out

Sites = str | Collection[str] | Callable[[str], bool]


@dataclass
class SiteSelection:
    """The latent sites whose KL terms are weighted."""

    choose: Callable[[str, Any], bool]
    is_weighted: dict[str, bool] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, site: Any) -> None:
        """Decide about a guide site, if the first run has not done it already."""
        name = site["name"]
        if name not in self.is_weighted:
            stem = _stem(name)
            self.is_weighted[name] = self.is_weighted.get(stem, self.choose(stem, site))


def select_sites(sites: Sites, programs: Programs) -> SiteSelection:
    """Return the choice of weighted sites, from one run of model and guide.

    The choice also covers sites that appear only in later runs.

    :param sites: ``"global"``, ``"all"``, names, or a function of a name; see
        :class:`KLWeightedELBO`.
    :param programs: the model and guide.
    :raises ValueError: if ``sites`` matches no latent site, or if the guide draws weighted and
        unweighted sites together.
    """
    with kept_random_states(), torch.no_grad():
        model_trace, guide_trace = programs.run().values()
        guide_trace.compute_log_prob()
    drawn = {
        name: node
        for name, node in guide_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }
    latent = [name for name in drawn if name in model_trace.nodes]
    choose = _chooser(sites, model_trace, list(drawn))
    selection = SiteSelection(choose, {name: choose(name, drawn[name]) for name in latent})
    if not any(selection.is_weighted.values()) and sites != "all":
        raise ValueError(
            f"KLWeightedELBO: sites, which is {describe(sites)}, matches none of the latent sites "
            f"{abbreviate(latent)} of the guide. For local latent variables, pass sites='all'."
        )
    auxiliary = [name for name in drawn if name not in model_trace.nodes]
    joint = [name for name in auxiliary if _stem(name) not in latent]
    if joint:
        _select_joint(joint, auxiliary, latent, drawn, selection)
    for name, node in drawn.items():
        selection.add(node)
        selection.dtypes[name] = node["log_prob"].dtype
    return selection


def _select_joint(
    joint: list[str],
    auxiliary: list[str],
    latent: list[str],
    drawn: dict[str, Any],
    selection: SiteSelection,
) -> None:
    """Add the auxiliary sites that may be drawn for several latent sites."""
    apart = {_stem(name) for name in auxiliary}
    together = [name for name in latent if is_delta(drawn[name]["fn"]) and name not in apart]
    weights = {selection.is_weighted[name] for name in together or latent}
    if together and len(weights) > 1:
        weighted = [name for name in together if selection.is_weighted[name]]
        raise ValueError(
            f"KLWeightedELBO: site '{joint[0]}' of the guide may draw the weighted sites "
            f"{abbreviate(weighted)} together with the unweighted sites "
            f"{abbreviate(sorted(set(together) - set(weighted)))}. Use a guide that draws them "
            "separately, or pass sites='all'."
        )
    for name in joint:
        are_all = weights == {True} or weights == {False}
        selection.is_weighted[name] = (
            weights == {True} if are_all else selection.choose(name, drawn[name])
        )


def _stem(name: str) -> str:
    """Return the latent site to which an autoguide's auxiliary site belongs."""
    return name.removesuffix("_unconstrained").removesuffix("_aux")


def _chooser(sites: Sites, model_trace: Trace, latent: list[str]) -> Callable[[str, Any], bool]:
    """Return a function that decides from a name and a site whether the site is weighted."""
    if callable(sites):
        return lambda name, site: bool(sites(name))
    if sites == "all":
        return lambda name, site: True
    if not isinstance(sites, str):
        names = set(sites)
        unknown = sorted(names - set(latent))
        if unknown:
            raise ValueError(
                f"KLWeightedELBO: sites contains {abbreviate(unknown)}, but the latent sites of "
                f"the guide are {abbreviate(latent)}. Pass names of latent sites."
            )
        return lambda name, site: name in names
    observed = [
        node
        for node in model_trace.nodes.values()
        if node["type"] == "sample" and node["is_observed"] and not is_masked_out(node)
    ]
    # A factor may be a term of the prior, so it counts as data only if there is nothing else.
    data = [node for node in observed if not isinstance(node["fn"], Unit)] or observed
    data_plates = [_plates(node) for node in data]
    return lambda name, site: not any(plates and plates <= _plates(site) for plates in data_plates)


def _plates(node: Any) -> frozenset[str]:
    return frozenset(frame.name for frame in node["cond_indep_stack"])
