"""A report and the history tell what has been captured, evicted and left to eager steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ext.infer import CompiledSVI, TrainingHistory, compile_elbo
from pyro_ext.infer.svi.capture import graphs


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.7))


def make(cls=CompiledSVI, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    options = {} if cls is SVI else {"backend": "eager", "fallback": False, **options}
    return cls(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)


def rows(*sizes):
    return [torch.linspace(0.0, 1.0, size) for size in sizes]


def test_lists_graphs_with_their_cost_and_use():
    svi = make()
    for x in rows(3, 3, 3, 4, 3):
        svi.step(x)
    svi.evaluate_loss(*rows(3))
    report = svi.capture_report()
    assert [graph.step for graph in report.graphs] == [1, 3, 5]
    assert [graph.num_runs for graph in report.graphs] == [3, 1, 1]
    assert [graph.has_gradients for graph in report.graphs] == [True, True, False]
    assert report.num_steps == 5
    assert report.num_eager_steps == 1
    for graph in report.graphs:
        assert graph.capture_seconds > 0
        assert graph.compile_seconds == 0
        assert graph.num_kernels is None
        assert graph.num_operations > 5
    assert [step for step, _ in report.events] == [1, 3, 5]
    assert "3 of at most 8 graphs; 1 of 5 steps without a graph" in str(report)
    assert "graph after step 5, without gradients: " in str(report)


@pytest.mark.long
def test_counts_kernels_and_the_time_of_the_compiler():
    svi = make(backend="inductor")
    svi.step(*rows(3))
    (graph,) = svi.capture_report().graphs
    assert 0 < graph.num_kernels < graph.num_operations
    assert graph.compile_seconds > graph.capture_seconds / 10


@pytest.mark.parametrize("compile_after", [1, 2, 5])
def test_shapes_get_a_graph_after_a_number_of_steps(compile_after):
    sizes = [3] * 8 + [4] * 8 + [5]
    svi = make(compile_after=compile_after)
    found = [svi.step(x) for x in rows(*sizes)]
    report = svi.capture_report()
    assert [graph.step for graph in report.graphs] == [compile_after, 8 + compile_after]
    assert report.num_eager_steps == 2 * compile_after + 1
    other = make(SVI)
    assert found == pytest.approx([other.step(x) for x in rows(*sizes)])


def test_modules_wait_for_repeated_shapes_too():
    pyro.clear_param_store()
    loss = compile_elbo(Trace_ELBO(), backend="eager", compile_after=2)(model, guide)
    for x in rows(3, 3, 3, 4, 4, 3):
        loss(x).backward()
    report = loss.capture_report()
    # The first call does not count, because it may create parameters.
    assert [graph.step for graph in report.graphs] == [5]
    assert report.num_eager_steps == 5


def test_idle_graphs_make_room(monkeypatch):
    monkeypatch.setattr(graphs, "_NUM_IDLE", 5)
    sizes = [3] * 6 + [4] * 6 + [5] * 6 + [4] * 6 + [3] * 4
    svi = make(max_graphs=2)
    found = [svi.step(x) for x in rows(*sizes)]
    report = svi.capture_report()
    assert [graph.step for graph in report.graphs] == [6, 24]
    assert report.num_eager_steps == 1
    evicted = [entry for entry in report.events if entry[1].startswith("evicted")]
    assert evicted == [
        (12, "evicted the graph of step 1, last used at 6"),
        (24, "evicted the graph of step 12, last used at 18"),
    ]
    other = make(SVI)
    assert found == pytest.approx([other.step(x) for x in rows(*sizes)])


def test_graphs_in_use_do_not_make_room():
    svi = make(max_graphs=2, fallback=True)
    with pytest.warns(UserWarning, match="max_graphs=2 graphs"):
        _ = [svi.step(x) for x in rows(3, 4, 5, 3, 4, 5)]
    report = svi.capture_report()
    assert [graph.step for graph in report.graphs] == [1, 1]
    assert report.num_eager_steps == 3
    ((step, event),) = [x for x in report.events if "eager steps" in x[1]]
    assert step == 2
    assert "max_graphs=2" in event


def test_the_history_has_the_events_of_the_run(tmp_path):
    svi, path = make(), tmp_path / "run.pt"
    history = svi.run(rows(3, 3, 4), 2, progress_bar=False, checkpoint=path)
    assert history.num_eager_steps == 1
    assert [step for step, _ in history.events] == [0, 2]
    assert TrainingHistory.from_state_dict(history.state_dict()).events == history.events
    resumed = make().run(rows(3, 3, 4), 3, progress_bar=False, resume=path)
    assert resumed.num_eager_steps == 1
    assert [step for step, _ in resumed.events] == [0, 2, 6, 8]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="compile_after must be at least 0, but it is -1"):
        make(compile_after=-1)
    with pytest.raises(TypeError, match="compile_after must be an integer"):
        make(compile_after=1.5)
