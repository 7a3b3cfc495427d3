"""Mistakes that users make: for each, a call, the exception, and words of its message.

Run this file to print the messages: ``python -m tests.mistakes``.
"""

import traceback
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

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
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
)
from pyro_ext.nn import BayesianModule

N = 20
X = torch.linspace(-2, 2, N)
MASK = torch.arange(N) < 15
ITEMS = torch.arange(5).repeat(4)
ELBO_3 = ImportanceWeightedELBO(3)


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, pyro.param("scale", torch.tensor(1.0))))


def global_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def global_guide(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))


def both_model(x: Tensor, **plate: Any) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", **(plate or {"size": len(x)})):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def both_guide(x: Tensor, **plate: Any) -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", **(plate or {"size": len(x)})):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def minibatch_model(x: Tensor) -> None:
    both_model(x, size=5 * N, subsample_size=len(x))


def rows_model(x: Tensor) -> None:
    both_model(x, size=5 * N, subsample=x)


def rows_guide(x: Tensor) -> None:
    both_guide(x, size=5 * N, subsample=x)


def sequential_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(x), subsample_size=4):
        pyro.sample(f"x_{i}", dist.Normal(loc, 1.0), obs=x[i])


def indexing_model(x: Tensor) -> None:
    with pyro.plate("items", 5):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(a[ITEMS], 1.0), obs=x)


def mixing_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(0), 1.0), obs=x)


def masked_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)


def masked_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(N)), 1.0))


def imputing_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=MASK)


def discrete_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(N))))


def unbounded_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(-3.0, pyro.param("top", torch.tensor(3.0))))


def flow_guide(x: Tensor) -> None:
    flow = pyro.module("flow", dist.transforms.planar(1))
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def vector_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def narrow_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(50.0, 51.0))


def plain_guide(x: Tensor) -> None:
    """The guide of local_model without its plate."""
    pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


def factor_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -z.square())


def svi(
    elbo: Any = ELBO_3, model: Any = local_model, guide: Any = local_guide, cls: Any = SVI
) -> Any:
    return cls(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)


def fitted(model: Any, make: Any, x: Tensor) -> Any:
    guide = make(model)
    guide(x)
    return guide


def with_nan(at: int) -> Tensor:
    x = X.clone()
    x[at] = torch.nan
    return x


Mistake = tuple[Callable[[], Any], type[Exception], str]

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
        "the guide is a tensor of shape .20,.. Pass the guide first",
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
        "schedule must be a KLSchedule, but it is the class GeometricKL",
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
    # Sites that do not match.
    "a latent site that the guide lacks": (
        lambda: ELBO_3.loss(both_model, local_guide, X),
        ValueError,
        "Latent site 'loc' of the model is missing from the guide",
    ),
    "a guide site that the model lacks": (
        lambda: ELBO_3.loss(local_model, both_guide, X),
        ValueError,
        "Site 'loc' of the guide is missing from the model",
    ),
    "an observed site in the guide": (
        lambda: ELBO_3.loss(poutine.condition(local_model, data={"z": X}), local_guide, X),
        ValueError,
        "Site 'z' is observed in the model but sampled in the guide",
    ),
    "a site in other plates": (
        lambda: ELBO_3.loss(local_model, plain_guide, X),
        ValueError,
        "Site 'z' is in the plates .* Put it in the same plates in both",
    ),
    "a mask in the model alone": (
        lambda: ELBO_3.loss(masked_model, local_guide, X),
        ValueError,
        "Latent site 'z' has another mask in the guide than in the model",
    ),
    "imputed values in an automatic guide": (
        lambda: ELBO_3.loss(imputing_model, AutoNormal(imputing_model), X),
        ValueError,
        "'x_unobserved' has another mask .* obs_mask=",
    ),
    "a site marked for enumeration": (
        lambda: ELBO_3.loss(config_enumerate(discrete_model, "parallel"), discrete_guide, X),
        ValueError,
        "Site 'z' is marked for enumeration.*TraceEnum_ELBO",
    ),
    "evidence of a site marked for enumeration": (
        lambda: estimate_evidence(discrete_model, config_enumerate(discrete_guide, "parallel"), X),
        ValueError,
        "Site 'z' is marked for enumeration.*draw the site in the guide",
    ),
    # Plates and minibatches.
    "a subsampled plate beside a global site": (
        lambda: ELBO_3.loss(
            minibatch_model, lambda x: both_guide(x, size=5 * N, subsample_size=N), X
        ),
        ValueError,
        "Plate 'data' is subsampled .20 of 100.*pass local_plate='data'",
    ),
    "evidence of a minibatch beside a global site": (
        lambda: estimate_evidence(rows_model, rows_guide, X),
        ValueError,
        "Plate 'data' is subsampled .20 of 100.*Use all rows of the plate, without",
    ),
    "export of a minibatch": (
        lambda: from_pyro_svi(rows_model, rows_guide, X),
        ValueError,
        "plate 'data' has 20 of 100 rows.*Pass the arguments for all 100 rows",
    ),
    "loo of a minibatch": (
        lambda: loo(rows_model, rows_guide, X),
        ValueError,
        "plate 'data' has 20 of 100 rows",
    ),
    "a subsampled sequential plate": (
        lambda: ELBO_3.loss(sequential_model, global_guide, X),
        ValueError,
        "is subsampled .4 of 20. but is sequential.*Make it a vectorised plate",
    ),
    "an automatic guide on smaller minibatches": (
        lambda: ELBO_3.loss(minibatch_model, fitted(minibatch_model, AutoNormal, X), X[:5]),
        ValueError,
        "subsamples of different sizes.*create_plates",
    ),
    "an automatic guide with other rows": (
        lambda: ImportanceWeightedELBO(1).loss(
            rows_model, fitted(rows_model, AutoNormal, X), X + 1
        ),
        ValueError,
        "Plate 'data' has the rows subsample=.*create_plates",
    ),
    "a guide plate without a size on a minibatch": (
        lambda: ELBO_3.loss(
            lambda x: local_on(x, size=100, subsample_size=N), lambda x: guide_on(x), X
        ),
        ValueError,
        "Plate 'data' has no size in the guide, but it is subsampled in the model .20 of 100",
    ),
    "a local plate that does not exist": (
        lambda: ImportanceWeightedELBO(3, local_plate="rows").loss(both_model, both_guide, X),
        ValueError,
        "local_plate='rows' is not one of the vectorised plates",
    ),
    "a local plate for a joint guide": (
        lambda: ImportanceWeightedELBO(3, local_plate="data").loss(
            both_model, AutoMultivariateNormal(both_model), X
        ),
        ValueError,
        "the guide draws no latent site inside the plate",
    ),
    "rows of a plate that the programs ignore": (
        lambda: estimate_evidence(local_model, local_guide, X, data_plate="data", batch_size=5),
        ValueError,
        "must index their data with the indices that pyro.plate.'data'. yields",
    ),
    "a batch size without a plate": (
        lambda: estimate_evidence(local_model, local_guide, X, batch_size=5),
        ValueError,
        "batch_size=5 needs data_plate",
    ),
    "a plate that is not common": (
        lambda: estimate_evidence(local_model, local_guide, X, data_plate="rows", batch_size=5),
        ValueError,
        "data_plate must be the name of a plate around every latent site",
    ),
    "no data": (
        lambda: ELBO_3.loss(local_model, local_guide, X[:0]),
        ValueError,
        "A plate has size 0, because the data are empty",
    ),
    "evidence without data": (
        lambda: estimate_evidence(local_model, local_guide, X[:0]),
        ValueError,
        "A plate has size 0, because the data are empty",
    ),
    "a loader without batches": (
        lambda: estimate_evidence(local_model, local_guide, data_loader=[]),
        ValueError,
        "data_loader has no batches",
    ),
    "a guide that was fitted to other data": (
        lambda: ELBO_3.loss(local_model, fitted(local_model, AutoNormal, X), X[:5]),
        ValueError,
        "'z' is in the plates .*An automatic guide has the plates of its first run",
    ),
    # Programs that cannot take the dim of the particles.
    "dims counted from the left": (
        lambda: ELBO_3.loss(indexing_model, AutoNormal(indexing_model), X),
        ValueError,
        "after its site 'a'.*pass vectorize_particles=False",
    ),
    "evidence with dims counted from the left": (
        lambda: estimate_evidence(indexing_model, AutoNormal(indexing_model), X),
        ValueError,
        "after its site 'a'.*pass chunk_size=1",
    ),
    "annealing with dims counted from the left": (
        lambda: annealed_importance_sampling(indexing_model, AutoNormal(indexing_model), X),
        ValueError,
        "after its site 'a'.*use estimate_evidence with chunk_size=1",
    ),
    "an error that has nothing to do with the particles": (
        lambda: ELBO_3.loss(lambda x: local_model(x @ x.new_zeros(3)), local_guide, X),
        RuntimeError,
        "size mismatch|inconsistent tensor size",
    ),
    "particles that are mixed": (
        lambda: svi(model=mixing_model).step(X),
        ValueError,
        "Site 'x' of the model has another.*mixes particles.*vectorize_particles=False",
    ),
    "draws that are mixed": (
        lambda: diagnose(mixing_model, local_guide, X),
        ValueError,
        "Site 'x' of the model has another.*mixes particles.*chunk_size=1",
    ),
    "an expectation without the particle dim": (
        lambda: estimate_expectation(lambda x: (global_model(x), x.sum())[1], global_guide, X),
        ValueError,
        "the first dim of the tensor that the model returns must be the dim of the particles",
    ),
    # Gradients.
    "dreg for a discrete guide": (
        lambda: ImportanceWeightedELBO(3, "dreg").loss_and_grads(discrete_model, discrete_guide, X),
        ValueError,
        "needs a reparameterised site .* Use gradient='pathwise'",
    ),
    "dreg for a support that moves": (
        lambda: ImportanceWeightedELBO(3, "dreg").loss_and_grads(local_model, unbounded_guide, X),
        ValueError,
        "'z' has a support with a bound that depends on a parameter.*gradient='pathwise'",
    ),
    "dreg for a flow without an inverse": (
        lambda: ImportanceWeightedELBO(3, "dreg").loss_and_grads(vector_model, flow_guide, X),
        ValueError,
        "'z' has no density at a given value.*no inverse",
    ),
    "chunks of a differentiable loss": (
        lambda: ImportanceWeightedELBO(4, particle_chunk_size=2).differentiable_loss(
            local_model, local_guide, X
        ),
        NotImplementedError,
        "does not support particle_chunk_size=2.*Use loss_and_grads",
    ),
    # Values that are not finite.
    "NaN in the data": (
        lambda: svi().step(with_nan(3)),
        ValueError,
        "NaN|nan",
    ),
    "NaN under a mask": (
        lambda: svi(model=masked_model, guide=masked_guide).step(with_nan(17)),
        ValueError,
        "the gradient is NaN. Site 'x' of the model observes NaN under its mask",
    ),
    "a guide beside the posterior": (
        lambda: svi(model=support_model, guide=narrow_guide).step(X),
        ValueError,
        "loss is inf. The log-probability of site 'z' of the model is infinite",
    ),
    "evidence by a guide beside the posterior": (
        lambda: estimate_evidence(support_model, narrow_guide, X),
        ValueError,
        "all 1000 weights are zero for data points .* Use a wider guide",
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
        "integers",
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
        lambda: BayesianModule(local_model),  # type: ignore[arg-type]
        TypeError,
        "must be a|Module",
    ),
    # Runs.
    "a run without batches": (
        lambda: svi(cls=EagerSVI).run([], num_epochs=1),
        ValueError,
        "data has 0 minibatches in epoch 1",
    ),
}


def support_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(-5.0, 5.0, validate_args=False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_on(x: Tensor, **plate: Any) -> None:
    with pyro.plate("data", **plate):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_on(x: Tensor) -> None:
    with pyro.plate("data"):
        pyro.sample("z", dist.Normal(x, 1.0))


def message_of(error: BaseException) -> str:
    """The message of an error with its notes, as a traceback shows them."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


if __name__ == "__main__":
    for name, (call, _, _) in MISTAKES.items():
        pyro.clear_param_store()
        try:
            call()
        except Exception as error:
            print(f"## {name}\n{type(error).__name__}: {message_of(error)}\n")
        else:
            traceback.print_stack()
            print(f"## {name}\nNO ERROR\n")
