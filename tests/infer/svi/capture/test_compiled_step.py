"""A compiled step computes what the programs do, and their errors come through."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from pyro_ext.infer.svi.capture import build_step
from pyro_ext.infer.svi.capture.backends import Compiled
from tests.infer.svi.capture.programs import X, assert_follows, guide, observe
from tests.infer.svi.programs import PROBLEMS, images, vae


class Doubled(Trace_ELBO):
    def loss(self, *args, **kwargs):
        return 2 * super().loss(*args, **kwargs)


class Clipped(Trace_ELBO):
    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        for _, param in pyro.get_param_store().named_parameters():
            if param.grad is not None:
                param.grad.clamp_(-0.1, 0.1)
        return loss


@pytest.mark.long
def test_overridden_losses_are_not_bypassed():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Doubled(), backend="eager")
    svi.step(X)
    state = pyro.util.get_rng_state()
    expected = Trace_ELBO().loss(model, guide, X)
    pyro.util.set_rng_state(state)
    with pytest.warns(UserWarning, match="the graph gives other results than the eager step"):
        assert svi.evaluate_loss(X) == pytest.approx(2 * expected, rel=1e-6)
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Clipped(), backend="eager")
    with pytest.warns(
        UserWarning, match="other results than the eager step: the gradient of 'loc'"
    ):
        svi.step(X)


def test_losses_in_chunks_take_eager_steps():
    loss = ImportanceWeightedELBO(4, particle_chunk_size=2)
    problem = vae(loss=loss)
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), loss, backend="eager")
    with pytest.warns(UserWarning, match="does not support particle_chunk_size=2"):
        svi.step(*problem.args)
    svi.step(*problem.args)


def test_handlers_around_the_steps_are_seen():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = CompiledSVI(
        model,
        guide,
        pyro.optim.SGD({"lr": 0.0}),
        Trace_ELBO(),
        backend="eager",
        fallback=False,
    )
    assert_follows(svi, X)
    with pyro.poutine.scale(scale=3.0):
        assert_follows(svi, X)
        assert_follows(svi, X)
    assert_follows(svi, X)
    assert svi._graphs.count == 2


def test_errors_of_the_programs_come_through():
    problem = PROBLEMS["VAE"]()
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), problem.loss, backend="eager")
    svi.step(*problem.args)
    with (
        pytest.warns(UserWarning, match="takes eager steps"),
        pytest.raises(RuntimeError, match="mat1 and mat2"),
    ):
        svi.step(images()[:, :5])


@pytest.mark.parametrize("fallback", [True, False])
def test_a_loss_that_is_not_finite_changes_nothing(fallback):
    problem = vae()
    svi = CompiledSVI(
        *problem[:2],
        pyro.optim.Adam({"lr": 0.01}),
        problem.loss,
        backend="eager",
        fallback=fallback,
    )
    svi.step(*problem.args)
    before = {name: p.clone() for name, p in pyro.get_param_store().named_parameters()}
    x = images()
    x[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"of site 'z' of the guide is NaN|found invalid values"):
        svi.step(x)
    for name, param in pyro.get_param_store().named_parameters():
        assert torch.equal(param, before[name])
    svi.step(*problem.args)


@pytest.mark.long
def test_without_a_compiler_graphs_run_as_they_are(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    problem = vae()
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CompiledSVI(*problem[:2], optim, problem.loss)
    strict = CompiledSVI(*problem[:2], optim, problem.loss, fallback=False)
    with config.patch({"cpp.cxx": ("/without/a/compiler",)}):
        with pytest.warns(
            UserWarning, match=r"runs graphs without compiling them: inductor could not"
        ):
            svi.step(*problem.args)
        svi.step(*problem.args)
        assert svi._graphs.count == 1
        with pytest.raises(RuntimeError, match="inductor could not compile"):
            strict.step(*problem.args)


@pytest.mark.long
def test_a_wrong_compiler_is_found_out(monkeypatch):
    def compile_wrongly(graph, inputs, backend):
        def run(*tensors):
            loss, *gradients = graph(*tensors)
            return [loss, *(None if g is None else 1.01 * g for g in gradients)]

        return Compiled(run, num_kernels=1)

    monkeypatch.setattr(build_step, "compile_graph", compile_wrongly)
    problem = vae()
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), problem.loss)
    with pytest.warns(UserWarning, match=r"runs graphs without .* the gradient of 'vae\$\$\$"):
        svi.step(*problem.args)
    assert_follows(svi, *problem.args)
    assert svi._graphs.count == 1
    strict = CompiledSVI(*problem[:2], pyro.optim.Adam({}), problem.loss, fallback=False)
    with pytest.raises(RuntimeError, match=r"than the eager step: the gradient of 'vae\$\$\$"):
        strict.step(*problem.args)
