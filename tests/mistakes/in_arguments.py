"""Wrong arguments."""

import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo, simulation_based_calibration
from pyro_ext.distributions import DiscretizedLogistic, NormalScaleMixture
from pyro_ext.infer import (
    CompiledSVI,
    EagerSVI,
    GeometricKL,
    ImportanceWeightedELBO,
    JackknifeELBO,
    KLWeightedELBO,
    MultiplyImportanceWeightedELBO,
    estimate_evidence,
)
from pyro_ext.nn import BayesianModule
from tests.mistakes.mistake import Mistake
from tests.mistakes.programs import (
    ELBO_3,
    X,
    both_model,
    factor_model,
    global_guide,
    local_guide,
    local_model,
    svi,
)

#: name -> (call, exception, a regular expression for its message)
MISTAKES: dict[str, Mistake] = {
    # The wrong kind of argument.
    "the class of an ELBO": (
        lambda: svi(ImportanceWeightedELBO).step(X),
        TypeError,
        "Pass an instance to SVI",
    ),
    "the class of an ELBO, compiled": (
        lambda: svi(ImportanceWeightedELBO, cls=CompiledSVI),
        TypeError,
        "the loss is the class ImportanceWeightedELBO. Pass an instance",
    ),
    "the class of a guide": (
        lambda: ELBO_3.loss(local_model, AutoNormal, X),
        TypeError,
        "the guide is the class AutoNormal. Pass an instance",
    ),
    "a list as a model": (
        lambda: ELBO_3.loss([local_model], local_guide, X),
        TypeError,
        "the model is a list of length 1",
    ),
    "an SVI as a model of an ELBO": (
        lambda: ELBO_3.loss(svi(), local_guide, X),
        TypeError,
        "the model is an SVI. Pass its model, svi.model",
    ),
    "data in place of the guide": (
        lambda: estimate_evidence(local_model, X),
        TypeError,
        "the guide is a tensor of shape .20,.. Pass the model, then the guide",
    ),
    "a list in place of chains": (
        lambda: from_pyro_svi([local_model, local_guide], X),
        TypeError,
        "one SVI, or one tuple of model and guide, for each chain",
    ),
    "no guide": (lambda: from_pyro_svi(local_model), TypeError, "the guide is missing"),
    "an SVI that was not trained": (
        lambda: estimate_evidence(svi(), X),
        ValueError,
        "has not been trained. Call svi.step first",
    ),
    "arguments given twice": (
        lambda: estimate_evidence(local_model, local_guide, X, model_args=(X,)),
        TypeError,
        "were given twice",
    ),
    "the class of a schedule": (
        lambda: KLWeightedELBO(Trace_ELBO(), GeometricKL),
        TypeError,
        "schedule must be an instance of KLSchedule, but it is the class GeometricKL",
    ),
    "a nonlinear bound with a KL factor": (
        lambda: KLWeightedELBO(ELBO_3, GeometricKL(5)),
        ValueError,
        "must have num_particles=1, but it has 3",
    ),
    "no particles": (
        lambda: ImportanceWeightedELBO(0),
        ValueError,
        "num_particles must be at least 1, but it is 0",
    ),
    "half a particle": (
        lambda: ImportanceWeightedELBO(2.5),  # type: ignore[arg-type]
        TypeError,
        "num_particles must be an integer >= 1, but it is 2.5",
    ),
    "an unknown gradient": (
        lambda: ImportanceWeightedELBO(3, gradient="reinforce"),
        ValueError,
        "gradient must be one of .'dreg', 'pathwise', 'stl'., but it is 'reinforce'",
    ),
    "an order as large as K": (
        lambda: JackknifeELBO(2, order=2),
        ValueError,
        "order must be below num_particles",
    ),
    "groups that do not divide K": (
        lambda: MultiplyImportanceWeightedELBO(5, 2),
        ValueError,
        "num_groups must divide num_particles",
    ),
    # Diagnostics.
    "loo without global sites": (
        lambda: loo(local_model, local_guide, X),
        ValueError,
        "the model has no global latent sites",
    ),
    "loo with a joint guide": (
        lambda: loo(both_model, AutoMultivariateNormal(both_model), X),
        ValueError,
        "the guide draws the latent sites in plate 'data' together with others",
    ),
    "a model that observes nothing": (
        lambda: from_pyro_svi(global_guide, global_guide, X),
        ValueError,
        "the model has no observed site",
    ),
    "a calibration of a factor": (
        lambda: simulation_based_calibration(factor_model, lambda m: AutoNormal(m), X),
        ValueError,
        "factor 'f', so it cannot be simulated from",
    ),
    "too few losses": (
        lambda: diagnose(local_model, local_guide, X, losses=[1.0, 2.0]),
        ValueError,
        "losses must be a sequence of at least 8 numbers",
    ),
    "too many names of dims": (
        lambda: from_pyro_svi(local_model, local_guide, X, dims={"x": ["a", "b"]}),
        ValueError,
        "dims has 2 names for 'x', whose shape is .20,.",
    ),
    # Distributions and modules.
    "pixels between 0 and 1": (
        lambda: DiscretizedLogistic(torch.zeros(()), torch.ones(())).log_prob(torch.tensor(0.5)),
        ValueError,
        r"Pass x as \(255 \* x\).round\(\), and give loc and scale in the same units",
    ),
    "an infinite location": (
        lambda: DiscretizedLogistic(torch.tensor(torch.inf), torch.ones(())),
        ValueError,
        "loc",
    ),
    "two spellings of the weights": (
        lambda: NormalScaleMixture(torch.ones(2), probs=torch.ones(2), logits=torch.ones(2)),
        ValueError,
        "probs.*logits|logits.*probs",
    ),
    "a function as a Bayesian module": (
        lambda: BayesianModule(local_model, dist.Normal(0.0, 1.0)),  # type: ignore[arg-type]
        TypeError,
        "net must be a plain torch.nn.Module, but it is a function",
    ),
    # Runs.
    "a run without batches": (
        lambda: svi(cls=EagerSVI).run([], num_epochs=1),
        ValueError,
        "data has 0 minibatches in epoch 1",
    ),
}
