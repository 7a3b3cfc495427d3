"""CompiledSVI takes the steps of SVI on the programs of Pyro's shapes, or says why not."""

import warnings

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceGraph_ELBO

from pyro_ext.infer import CompiledSVI
from tests.pyro_programs import PROGRAMS

#: Programs that take eager steps, with a part of the reason.
REFUSED = {
    # The operations depend on draws.
    "hmm_1": "uses the value of a tensor in Python code",  # as long as the sequences of a minibatch
    "nested_speaker": "uses the value of a tensor in Python code",
    "inclined_plane": "uses the value of a tensor in Python code",
    "rejection_by_simulation": "uses the value of a tensor in Python code",
    "air_recursive": "uses the value of a tensor in Python code",
    "stable_reparam": "uses the value of a tensor in Python code",  # near stability 1
    "spline_flow": "the shape of the result of aten.index.Tensor depends on values",
    "tracking": "is made outside of torch in each run, with other values",
    # They train networks that are not registered, so their gradients are not in the param store.
    "conditional_vae": "requires gradients, but is not in the param store",
    "cevae": "requires gradients, but is not in the param store",
}
CAPTURED = [name for name in PROGRAMS if name not in REFUSED]
WITH_TRACE_GRAPH = [
    "sleepy_detector",
    "ss_vae_sampled",
    "gaussian_mixture_sampled",
    "dirichlet_process",
    "lda_sampled",
    "named_mixture",
    "attend_infer_repeat",
    "hmm_sampled_markov",
    "vae",
    "masks_and_scales",
]


#: Programs whose losses change by more than 1e-5 if the parameters move by 1e-7.
CHAOTIC = ["variational_gp", "deep_kernel"]


def losses_of(cls, name, make_elbo, num_steps, nudge=0.0, **options):
    model, guide, args, kwargs = PROGRAMS[name].build()
    svi = cls(model, guide, pyro.optim.Adam({"lr": 0.01}), make_elbo(), **options)
    pyro.set_rng_seed(1)
    losses = [svi.step(*args, **kwargs)]
    with torch.no_grad():
        for _, param in pyro.get_param_store().named_parameters():
            param *= 1 + nudge
    losses += [svi.step(*args, **kwargs) for _ in range(num_steps - 1)]
    return [*losses, svi.evaluate_loss(*args, **kwargs)]


def assert_takes_the_steps_of_svi(name, make_elbo, num_steps=30, backend="eager"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = losses_of(SVI, name, make_elbo, num_steps)
        found = losses_of(CompiledSVI, name, make_elbo, num_steps, backend=backend, fallback=False)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["hmm_3", "gaussian_mixture_enumerated"])
def test_enumerated_programs_take_the_steps_of_svi(name):
    assert_takes_the_steps_of_svi(name, PROGRAMS[name].make_elbo, 5)


# Inductor's own sums over indices write out of bounds for the first (pytorch#191837), and it cannot
# compile the masks of the second.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hmm_3", "lkj_from_example"])
def test_programs_are_compiled_as_they_are(name):
    assert_takes_the_steps_of_svi(name, PROGRAMS[name].make_elbo, 3, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CAPTURED} - {*CHAOTIC}))
def test_compiled_programs_take_the_steps_of_svi(name):
    assert_takes_the_steps_of_svi(name, PROGRAMS[name].make_elbo, 5, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURED)
def test_programs_take_the_steps_of_svi(name):
    make_elbo = PROGRAMS[name].make_elbo
    assert_takes_the_steps_of_svi(name, make_elbo, 5 if name in CHAOTIC else 30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHAOTIC)
def test_chaotic_programs_are_chaotic_in_eager_steps(name):
    make_elbo = PROGRAMS[name].make_elbo
    expected = losses_of(SVI, name, make_elbo, 30)
    moved = losses_of(SVI, name, make_elbo, 30, nudge=1e-7)
    assert moved != pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TRACE_GRAPH)
def test_programs_take_the_steps_of_svi_with_trace_graph_elbo(name):
    assert_takes_the_steps_of_svi(name, TraceGraph_ELBO)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_cannot_be_captured_say_why(name):
    model, guide, args, kwargs = PROGRAMS[name].build()
    optim = pyro.optim.Adam({"lr": 0.01})
    elbo = PROGRAMS[name].make_elbo()
    svi = CompiledSVI(model, guide, optim, elbo, backend="eager", fallback=False)
    pyro.set_rng_seed(1)
    with pytest.raises(RuntimeError, match=REFUSED[name]):
        svi.step(*args, **kwargs)
