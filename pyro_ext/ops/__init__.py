"""Pure tensor functions. They use torch, but not Pyro."""

import warnings
from typing import Any

from pyro_ext.ops.bits_per_dim import bits_per_dim
from pyro_ext.ops.discretized_logistic import discretized_logistic_mixture_log_prob
from pyro_ext.ops.fused import use_fused_kernels
from pyro_ext.ops.jackknife import (
    MAX_SUBSETS,
    TooManySubsetsError,
    jackknife,
    jackknife_coefficients,
    jackknife_derivatives,
)
from pyro_ext.ops.log_mean_exp import leave_one_out_log_mean_exp, leave_one_out_mean, log_mean_exp
from pyro_ext.ops.normal_scale_mixture import (
    normal_scale_mixture_log_densities,
    normal_scale_mixture_log_prob,
)
from pyro_ext.ops.once_differentiable import may_need_gradient, once_differentiable
from pyro_ext.ops.pareto import MIN_DRAWS, pareto_k
from pyro_ext.ops.precision import accumulation_dtype
from pyro_ext.ops.weight_statistics import LogMoments, WeightStatistics

__all__ = [
    "MAX_SUBSETS",
    "MIN_DRAWS",
    "LogMoments",
    "TooManySubsetsError",
    "WeightStatistics",
    "accumulation_dtype",
    "bits_per_dim",
    "discretized_logistic_mixture_log_prob",
    "jackknife",
    "jackknife_coefficients",
    "jackknife_derivatives",
    "leave_one_out_log_mean_exp",
    "leave_one_out_mean",
    "log_mean_exp",
    "may_need_gradient",
    "normal_scale_mixture_log_densities",
    "normal_scale_mixture_log_prob",
    "once_differentiable",
    "pareto_k",
    "use_fused_kernels",
]


def __getattr__(name: str) -> Any:
    if name == "jackknife_first_and_second":
        warnings.warn(
            "pyro_ext.ops.jackknife_first_and_second is deprecated. Use jackknife_derivatives.",
            DeprecationWarning,
            stacklevel=2,
        )
        return jackknife_derivatives
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
