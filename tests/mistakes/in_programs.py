"""Model and guide that do not match, or do not suit their data."""

from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_ext.diagnostics import from_pyro_svi, loo
from pyro_ext.infer import (
    ImportanceWeightedELBO,
    estimate_evidence,
)
from tests.mistakes.mistake import Mistake
from tests.mistakes.programs import (
    ELBO_3,
    N,
    X,
    both_guide,
    both_model,
    discrete_guide,
    discrete_model,
    fitted,
    global_guide,
    guide_on,
    imputing_model,
    local_guide,
    local_model,
    local_on,
    masked_model,
    minibatch_model,
    plain_guide,
    rows_guide,
    rows_model,
    sequential_model,
)

#: name -> (call, exception, a regular expression for its message)
MISTAKES: dict[str, Mistake] = {
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
        lambda: ELBO_3.loss(discrete_model, config_enumerate(discrete_guide, "parallel"), X),
        ValueError,
        "Site 'z' of the guide is marked for enumeration.*mark it in the model.*num_particles=1",
    ),
    "evidence of a site marked for enumeration": (
        lambda: estimate_evidence(discrete_model, config_enumerate(discrete_guide, "parallel"), X),
        ValueError,
        "Site 'z' of the guide is marked for enumeration.*draw it in the guide",
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
        "Plate 'data' is subsampled .20 of 100.*Pass all rows of the plate, without",
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
        "has 5 rows in the model, but 20 in the guide.*create_plates",
    ),
    "an automatic guide with other rows": (
        lambda: ImportanceWeightedELBO(1).loss(
            rows_model, fitted(rows_model, AutoNormal, X), X + 1
        ),
        ValueError,
        "Plate 'data' has other rows in the guide than in the model.*create_plates",
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
}
