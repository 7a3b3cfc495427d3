"""Logistic regression with 20 coefficients on the breast cancer data of scikit-learn.

This command prints the reference:

    python -c "from tests.posteriors import logistic_regression as m; print(m.reference())"
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_ext.ops import LogMoments
from tests.posteriors.posterior import Posterior, posterior

PRIOR_SCALE = 2.0
#: From 4,000,000 draws, with the standard error.
REFERENCE = (-80.9298, 0.0014)


def model(design: Tensor, y: Tensor) -> None:
    """y ~ Bernoulli(sigmoid(design w)), w ~ N(0, PRIOR_SCALE)."""
    prior = dist.Normal(design.new_zeros(design.shape[1]), PRIOR_SCALE)
    w = pyro.sample("w", prior.to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=w @ design.T).to_event(1), obs=y)


def data() -> tuple[Tensor, Tensor]:
    """Return the first 20 columns, standardised, and the diagnoses."""
    from sklearn.datasets import load_breast_cancer

    columns, y = load_breast_cancer(return_X_y=True)
    design = torch.tensor(columns[:, :20])
    return (design - design.mean(0)) / design.std(0, correction=0), torch.tensor(y).double()


@posterior
def logistic_regression() -> Posterior:
    """The columns are strongly correlated."""
    guides = {"full-rank": AutoMultivariateNormal}
    return Posterior(model, data(), *REFERENCE, guides=guides)


def log_joint(w: Tensor, design: Tensor, y: Tensor) -> Tensor:
    """Return log p(y, w) for weights of shape ``(..., 20)``, without Pyro."""
    logits = w @ design.T
    log_likelihood = y * logits - torch.nn.functional.softplus(logits)
    return log_likelihood.sum(-1) + dist.Normal(0.0, PRIOR_SCALE).log_prob(w).sum(-1)


def laplace(design: Tensor, y: Tensor, num_steps: int = 50) -> MultivariateNormal:
    """Return the normal at the mode of the posterior with its curvature, by Newton's method."""
    w = design.new_zeros(design.shape[1])
    eye = torch.eye(len(w), dtype=w.dtype)
    for _ in range(num_steps):
        probs = (design @ w).sigmoid()
        precision = design.T @ (design * (probs * (1 - probs)).unsqueeze(1)) + eye / PRIOR_SCALE**2
        w = w + torch.linalg.solve(precision, design.T @ (y - probs) - w / PRIOR_SCALE**2)
    return MultivariateNormal(w, precision_matrix=precision)


def reference(num_chunks: int = 400, chunk_size: int = 10_000) -> tuple[float, float]:
    """Return the log evidence and its standard error, by importance sampling without Pyro."""
    torch.manual_seed(0)
    design, y = data()
    fit = laplace(design, y)
    proposal = dist.MultivariateStudentT(8.0, fit.loc, fit.scale_tril)
    moments = LogMoments()
    for _ in range(num_chunks):
        w = proposal.sample((chunk_size,))
        moments.update(log_joint(w, design, y) - proposal.log_prob(w))
    log_evidence = moments.largest + moments.mean.log()
    return log_evidence.item(), (moments.std_error / moments.mean).item()
