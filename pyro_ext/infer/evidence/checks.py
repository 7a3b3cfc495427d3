"""Checks that several estimates share."""

import warnings
from collections.abc import Iterable

from pyro_ext._arguments import check_integer, check_type
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.infer.evidence.flags import is_heavy, weight_flags
from pyro_ext.tracing.failures import data_points


def warn_of_heavy_tails(owner: str, evidence: Evidence, advice: str) -> None:
    """Warn about data points with a Pareto k above 0.7.

    :param owner: the name of the estimate, for the message.
    :param evidence: the estimate.
    :param advice: the last sentence of the message.
    """
    heavy = is_heavy(evidence)
    if heavy.any():
        warnings.warn(
            f"{owner}: Pareto k is above 0.7{data_points(heavy)}. A few draws dominate the "
            f"estimate, and its standard error is too small. {advice}",
            stacklevel=3,
        )


def warn_of_flags(owner: str, evidence: Evidence) -> None:
    """Warn of the flags that do not come from the weights alone.

    :param owner: the name of the estimate, for the messages.
    :param evidence: the estimate.
    """
    of_weights = weight_flags(evidence)
    for name, reason in evidence.flags.items():
        if name not in of_weights:
            warnings.warn(f"{owner}: {name}: {reason}", stacklevel=3)


def checked_orders(
    owner: str, jackknife_orders: Iterable[int], num_samples: int
) -> tuple[int, ...]:
    """Return the orders of a jackknife as a tuple, after a check.

    :param owner: the name of the estimate, for error messages.
    :param jackknife_orders: the orders.
    :param num_samples: the number of draws.
    :raises TypeError: if an order is not an integer.
    :raises ValueError: if an order is negative, or not below the number of draws.
    """
    check_type(owner, "jackknife_orders", jackknife_orders, Iterable, "a sequence of integers")
    orders = tuple(jackknife_orders)
    for order in orders:
        check_integer(owner, "each of jackknife_orders", order, 0)
        if order >= num_samples:
            raise ValueError(
                f"{owner}: each of jackknife_orders must be below the number of draws, "
                f"{num_samples}, but it is {order}. For one draw, pass jackknife_orders=()."
            )
    return orders
