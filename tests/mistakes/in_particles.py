"""Programs that particles, gradients or values make fail."""

from pyro.infer.autoguide import AutoNormal

from pyro_ext.diagnostics import diagnose
from pyro_ext.infer import (
    ImportanceWeightedELBO,
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
)
from tests.mistakes.mistake import Mistake
from tests.mistakes.programs import (
    ELBO_3,
    X,
    discrete_guide,
    discrete_model,
    flow_guide,
    global_guide,
    global_model,
    indexing_model,
    local_guide,
    local_model,
    masked_guide,
    masked_model,
    mixing_model,
    narrow_guide,
    support_model,
    svi,
    unbounded_guide,
    vector_model,
    with_nan,
)

#: name -> (call, exception, a regular expression for its message)
MISTAKES: dict[str, Mistake] = {
    # Programs that cannot take the dim of the particles.
    "dims counted from the left": (
        lambda: ELBO_3.loss(indexing_model, AutoNormal(indexing_model), X),
        ValueError,
        "after its site 'a'.*pass vectorize_particles=False",
    ),
    "evidence with dims counted from the left": (
        lambda: estimate_evidence(indexing_model, AutoNormal(indexing_model), X, chunk_size=9),
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
        r"The arguments \[0\] of model and guide hold NaN",
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
        "all 1000 weights are zero for data points .* Use a guide that draws them",
    ),
}
