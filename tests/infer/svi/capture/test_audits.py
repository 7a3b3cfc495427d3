"""Audits find what no comparison of values shows, and change nothing where there is nothing."""

import weakref
from collections import ChainMap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from pyro_ext.infer.svi.capture.audit_times import AuditTimes
from tests.infer.svi.capture.programs import X, guide, observe
from tests.infer.svi.programs import PROBLEMS
from tests.infer.svi.runs import compiled, make


@pytest.mark.parametrize("audit_every", [1, 2, 7, 500])
def test_gaps_at_most_double_up_to_the_longest(audit_every):
    for seed in range(20):
        times = AuditTimes(audit_every, seed)
        audits = [run for run in range(1, 6 * audit_every + 20) if times.is_due()]
        gaps = [late - early for early, late in zip([0, *audits], audits, strict=False)]
        longest = 1
        for gap in gaps:
            assert gap <= longest
            longest = min(2 * longest, audit_every)
        if audit_every > 2:
            assert {run % 2 for run in audits} == {0, 1}


def hidden_scale():
    """A model with a number to which no name leads, and a function that sets it."""
    holder = ChainMap({"scale": 1.0})

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, holder["scale"])

    return model, lambda scale: holder.update(scale=scale)


def make_svi(model, guide=guide, **options):
    optim = pyro.optim.Adam({"lr": 0.01})
    return CompiledSVI(model, guide, optim, Trace_ELBO(), backend="eager", **options)


def take(svi, num_steps):
    for _ in range(num_steps):
        svi.step(X)


def test_an_audit_names_the_suspect_steps():
    model, set_scale = hidden_scale()
    svi = make_svi(model, audit_every=5)
    for _ in range(23):
        svi.step(X)
    set_scale(3.0)
    with pytest.warns(UserWarning, match="takes eager steps: an audit at step") as record:
        take(svi, 5)
    message = str(record[0].message)
    assert "made from other numbers" in message
    since = int(message.split("steps after step ")[1].split(" ")[0])
    assert 23 - 5 <= since <= 23
    for _ in range(3):
        svi.step(X)
    assert len(record) == 1


def test_without_fallback_an_audit_raises_before_the_update():
    model, set_scale = hidden_scale()
    svi = make_svi(model, audit_every=1, fallback=False)
    svi.step(X)
    set_scale(3.0)
    before = pyro.param("loc").item()
    with pytest.raises(RuntimeError, match=r"audit at step 2 .* after step 1 are suspect"):
        svi.step(X)
    assert pyro.param("loc").item() == before
    with pytest.raises(RuntimeError, match=r"audit at step 2 .* after step 1 are suspect"):
        svi.step(X)


def test_the_audited_step_is_that_of_svi():
    results = []
    for cls in (SVI, lambda *args: CompiledSVI(*args, backend="eager", audit_every=1)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, set_scale = hidden_scale()
        svi = cls(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        svi.step(X)
        set_scale(3.0)
        if cls is SVI:
            losses = [svi.step(X), svi.step(X)]
        else:
            with pytest.warns(UserWarning, match="are suspect"):
                losses = [svi.step(X), svi.step(X)]
        results.append([*losses, pyro.param("loc").item(), torch.rand(()).item()])
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_evaluations_are_audited():
    model, set_scale = hidden_scale()
    svi = make_svi(model, audit_every=1)
    svi.step(X)
    svi.evaluate_loss(X)
    set_scale(3.0)
    pyro.set_rng_seed(1)
    with pytest.warns(UserWarning, match="audit at step 2"):
        found = svi.evaluate_loss(X)
    pyro.set_rng_seed(1)
    assert found == SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(X)


def test_a_tensor_that_no_name_leads_to():
    class Owner:
        scale = torch.tensor(1.0)

    owner = Owner()
    link = weakref.ref(owner)

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, link().scale)

    svi = make_svi(model, audit_every=4)
    for _ in range(10):
        svi.step(X)
    owner.scale.fill_(2.0)  # in place: the graph reads the tensor itself
    for _ in range(10):
        svi.step(X)
    owner.scale = torch.tensor(3.0)
    with pytest.warns(UserWarning, match="a tensor that no name leads to has changed"):
        take(svi, 4)


def test_a_graph_is_audited_before_another_one_replaces_it():
    model, set_scale = hidden_scale()
    offset = 0.0

    def with_offset(x):
        model(x + offset)

    svi = make_svi(with_offset, audit_every=1000)
    for _ in range(40):
        svi.step(X)
    set_scale(3.0)
    svi.step(X)
    offset = 1.0
    with pytest.warns(UserWarning, match="audit at step 42 found a change that no comparison"):
        svi.step(X)
    assert offset == 1.0


def test_graphs_are_audited_at_the_end_of_a_run():
    model, set_scale = hidden_scale()
    svi = make_svi(model, audit_every=1000)

    def callback(history):
        if len(history.losses) == 40:
            set_scale(3.0)

    with pytest.warns(UserWarning, match="audit at step 42 found a change"):
        svi.run(42, 1, False, callback, args=(X,))
    assert svi._graphs.count == 0


@pytest.mark.long
@pytest.mark.parametrize("audit_every", [1, 3])
def test_audits_change_no_number(audit_every):
    results = []
    for every in (audit_every, 10_000):
        svi, module = make(compiled)
        svi._graphs.audit_every = every
        x = torch.rand(6, 12).round()
        losses = [svi.step(x) for _ in range(12)] + [svi.evaluate_loss(x) for _ in range(3)]
        results.append((losses, module.state_dict(), pyro.util.get_rng_state()["torch"]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][2], results[1][2])
    for name, tensor in results[0][1].items():
        assert torch.equal(tensor, results[1][1][name]), name


def test_gradients_of_the_user_are_added_in_an_audit_too():
    values = []
    for every in (1, 10_000):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, _ = hidden_scale()
        svi = CompiledSVI(
            model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO(), "eager", audit_every=every
        )
        svi.step(X)
        for _ in range(3):
            pyro.param("loc").unconstrained().grad = torch.tensor(2.0)
            svi.step(X)
        values.append(pyro.param("loc").item())
    assert values[0] == values[1]


def test_a_compiler_that_turns_wrong_is_found_out():
    problem = PROBLEMS["VAE"]()
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), problem.loss, audit_every=1)
    svi._graphs.backend = svi._graphs.backend._replace(name="eager")
    svi.step(*problem.args)
    (graph,) = (graph for graphs in svi._graphs._by_key.values() for graph in graphs)
    run = graph.run
    graph.run = lambda *tensors: [x if x is None else 1.01 * x for x in run(*tensors)]
    with pytest.warns(UserWarning, match="runs graphs without compiling them: an audit at step 2"):
        svi.step(*problem.args)
    svi.step(*problem.args)
    assert svi._graphs.count == 1


def test_rounding_in_ill_conditioned_programs_is_no_difference():
    grid = torch.linspace(0, 5, 60)
    targets = (torch.sin(grid) > 0).float()

    def kernel(a, b):
        return torch.exp(-0.5 * (a[:, None] - b) ** 2)

    def model():
        inducing = pyro.param("inducing", grid[::6].clone())
        u = pyro.sample("u", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        factor = torch.linalg.cholesky(kernel(inducing, inducing) + 1e-6 * torch.eye(10))
        weights = torch.linalg.solve_triangular(factor, kernel(inducing, grid), upper=False)
        scale = (1 - weights.pow(2).sum(0)).clamp(min=0).sqrt() + 0.1
        pyro.sample("y", dist.Normal(weights.T @ u, scale).to_event(1), obs=targets)

    def normal_guide():
        pyro.sample("u", dist.Normal(pyro.param("loc", torch.zeros(10)), 1.0).to_event(1))

    svi = make_svi(model, normal_guide, audit_every=1, fallback=False)
    for _ in range(20):
        svi.step()


def test_float64_data_and_float32_parameters():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def normal_guide(x):
        loc = pyro.param("loc", 1000 * torch.ones(100))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    svi = CompiledSVI(
        model,
        normal_guide,
        pyro.optim.Adam({"lr": 0.01}),
        ImportanceWeightedELBO(2),
        backend="eager",
        fallback=False,
        audit_every=1,
    )
    x = torch.randn(100, dtype=torch.float64)
    for _ in range(5):
        svi.step(x)
