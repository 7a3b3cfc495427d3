"""Several draws of each site of a guide, combined in all ways."""

import math
from collections.abc import Iterable
from typing import Any

from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._private.of_pyro import packed_dims, with_packed_dims
from pyro_ext.tracing.sites import is_delta, is_untraced


class CombinedDraws(EnumMessenger):
    """A handler that draws each site of a guide K times, along a dim of its own.

    A site that depends on earlier sites has one draw for each k, given the k-th draws of these
    sites. A Delta site is a function of other sites, so it has no draws of its own.

    :param num_draws: the number of draws K > 1.
    :param first_available_dim: the dim to the left of all plates, negative.
    """

    def __init__(self, num_draws: int, first_available_dim: int) -> None:
        super().__init__(first_available_dim)
        self.num_draws = num_draws

    def _pyro_sample(self, msg: Message) -> None:
        is_left_alone = msg["is_observed"] or msg["done"] or is_untraced(msg)
        if not (is_left_alone or site_is_subsample(msg) or is_delta(msg["fn"])):
            draws: Any = {"enumerate": "parallel", "num_samples": self.num_draws}
            msg["infer"] = {**(msg["infer"] or {}), **draws}
        super()._pyro_sample(msg)


def num_draws_of(node: Any) -> int | None:
    """Return the number of draws of a site along a dim of its own; None if it has no such dim."""
    return node["infer"].get("num_samples") if "_enumerate_dim" in node["infer"] else None


def log_proposal(log_q: Tensor, own: str, drawn: Iterable[str], num_draws: int) -> Tensor:
    r"""Return the log density of the mixture from which the K draws of a site come.

    .. math:: \log \frac{1}{K} \sum_k q(z \mid z^k)

    Here :math:`z^k` stands for the k-th draws of the sites before.

    :param log_q: the packed log density of each draw given each combination of draws before.
    :param own: the symbol of the dim of the site's own draws.
    :param drawn: the symbols of the dims of all drawn sites.
    :param num_draws: the number of draws K.
    """
    dims = packed_dims(log_q)
    first, *others = [dim for dim in dims if dim in drawn and dim != own] or [""]
    for other in others:
        log_q = log_q.diagonal(dim1=dims.index(first), dim2=dims.index(other))
        dims = dims.replace(first, "").replace(other, "") + first
    if first:
        log_q = log_q.logsumexp(dims.index(first)) - math.log(num_draws)
    return with_packed_dims(log_q, dims.replace(first, ""))
