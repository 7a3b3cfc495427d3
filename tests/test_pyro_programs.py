"""Programs of the shapes of Pyro's examples, in every function of the package."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_ext.diagnostics import diagnose, from_pyro_svi
from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence
from tests.pyro_programs import PROGRAMS

#: (program, function) -> a part of the message
REFUSED = {
    ("missing_data", "loss"): "another mask in the guide",
    ("missing_data", "several"): "another mask in the guide",
    ("missing_data", "in turn"): "another mask in the guide",
    ("missing_data", "evidence"): "another mask in the guide",
    ("missing_data", "export"): "another mask in the guide",
    ("missing_data", "diagnose"): "another mask in the guide",
    ("subsampled_globals", "several"): "is subsampled",
    ("subsampled_globals", "in turn"): "is subsampled",
    ("subsampled_globals", "evidence"): "is subsampled",
    ("subsampled_locals", "several"): "is subsampled",
    ("subsampled_locals", "in turn"): "is subsampled",
    ("subsampled_locals", "evidence"): "is subsampled",
    ("vae_minibatch", "export"): "Pass the arguments for all 20 rows",
    ("vae_minibatch", "diagnose"): "Pass the arguments for all 20 rows",
    ("tracking", "export"): "cannot draw its observations",
    ("epidemic_relaxed", "export"): "Incorrect state",  # Pyro's, on drawn observations
    ("epidemic_relaxed", "diagnose"): "Incorrect state",
    ("air_recursive", "export"): "is not in every draw",
    ("air_recursive", "diagnose"): "is not in every draw",
    ("rejection_by_simulation", "export"): "is not in every draw",
    ("rejection_by_simulation", "diagnose"): "is not in every draw",
    ("hmm_1", "in turn"): "is subsampled",
    ("hmm_1", "evidence"): "is subsampled",
    ("hmm_1", "export"): "is not in every draw",  # a batch is as long as its longest sequence
    ("hmm_1", "diagnose"): "is not in every draw",
    ("lda", "in turn"): "is subsampled",
    ("lda", "evidence"): "is subsampled",
    ("gaussian_mixture_tmc", "loss"): "Leave out num_samples=",
    **{
        (name, call): message
        for name, message in {
            "auto_discrete_parallel": "Site 'is_outlier' of the guide is marked for enumeration",
            "ss_vae": "Site 'y' of the guide is marked for enumeration",
            "scanvi": "Site 'y' of the guide is marked for enumeration",
            "gaussian_mixture_tmc": "Leave out num_samples=",
        }.items()
        for call in ("several", "in turn", "evidence", "export", "diagnose")
    },
}

CALLS = {
    "several": lambda m, g, a, k: ImportanceWeightedELBO(3).loss_and_grads(m, g, *a, **k),
    "in turn": lambda m, g, a, k: ImportanceWeightedELBO(
        5, vectorize_particles=False
    ).loss_and_grads(m, g, *a, **k),
    "evidence": lambda m, g, a, k: estimate_evidence(m, g, *a, **k, num_samples=8).total,
    "export": lambda m, g, a, k: from_pyro_svi(m, g, *a, **k, num_samples=8),
    "diagnose": lambda m, g, a, k: diagnose(m, g, *a, **k, num_samples=8),
}


def gradients():
    store = pyro.get_param_store()
    return {name: p.grad for name, p in store.named_parameters() if p.grad is not None}


def one_step(program, elbo):
    model, guide, args, kwargs = program.build()
    with torch.no_grad(), poutine.block():
        guide(*args, **kwargs)  # draws the initial values of parameters
        poutine.block(model)(*args, **kwargs)
    pyro.set_rng_seed(1)
    loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    return loss, gradients()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_particle_takes_the_step_of_pyro(name):
    program = PROGRAMS[name]
    if (name, "loss") in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, "loss"]):
            one_step(program, ImportanceWeightedELBO(1))
        return
    loss, found = one_step(program, ImportanceWeightedELBO(1, max_plate_nesting=4))
    reference = TraceEnum_ELBO if program.enumerated else Trace_ELBO
    expected_loss, expected = one_step(program, reference(max_plate_nesting=4))
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-4)
    if name == "cevae":
        return  # Trace_ELBO has score terms for the observed sites of this guide
    for key in found.keys() | expected.keys():
        zero = torch.zeros(())
        x, y = (grads.get(key, zero) for grads in (found, expected))
        size = 1 + float(y.abs().max())
        torch.testing.assert_close(*torch.broadcast_tensors(x, y), rtol=1e-3, atol=1e-4 * size)


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_function_takes_the_program_or_says_why_not(call, name):
    program = PROGRAMS[name]
    refusal = REFUSED.get((name, call))
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            CALLS[call](*program.build())
        return
    try:
        found = CALLS[call](*program.build())
    except ValueError:
        if call != "several" or not program.one_at_a_time:
            raise
        return
    assert not isinstance(found, float) or math.isfinite(found)
