"""Objectives that are linear in the KL term, a constant factor, and programs with a known loss."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO, KLSchedule

LINEAR = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "ImportanceWeightedELBO": lambda: ImportanceWeightedELBO(1),
    "ImportanceWeightedELBO, dreg": lambda: ImportanceWeightedELBO(1, gradient="dreg"),
    "JackknifeELBO": lambda: JackknifeELBO(1, order=0),
}


class ConstantKL(KLSchedule):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def factor_at(self, step):
        return self.value

    @property
    def finished(self):
        return False


class Pair:
    """A global w, a local z in the data plate, both normal; the draws are given."""

    def __init__(self, num_data=12, dtype=torch.float64):
        self.x = torch.linspace(-2.0, 3.0, num_data, dtype=dtype)
        self.w_loc = pyro.param("w_loc", torch.tensor(0.7, dtype=dtype))
        self.w_scale = pyro.param("w_scale", torch.tensor(0.6, dtype=dtype))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_tensor(0.5), 2.0))
        with pyro.plate("data", len(self.x), subsample=x):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(pyro.param("w_loc"), pyro.param("w_scale")))
        with pyro.plate("data", len(self.x), subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.4))

    def terms(self, elbo, x):
        """The loss by hand on the draws that an objective makes: its parts for w, z and x."""
        trace = poutine.trace(self.guide).get_trace(x)
        w, z = trace.nodes["w"]["value"], trace.nodes["z"]["value"]
        prior, q = dist.Normal(x.new_tensor(0.5), 2.0), dist.Normal(self.w_loc, self.w_scale)
        local_prior, local_q = dist.Normal(w, 1.0), dist.Normal(x / 2, x.new_tensor(0.4))
        scale = len(self.x) / len(x)
        if isinstance(elbo, TraceMeanField_ELBO):
            kl = kl_divergence(q, prior), kl_divergence(local_q, local_prior)
        else:
            kl = (
                q.log_prob(w) - prior.log_prob(w),
                local_q.log_prob(z) - local_prior.log_prob(z),
            )
        return kl[0], scale * kl[1].sum(), -scale * dist.Normal(z, 0.5).log_prob(x).sum()
