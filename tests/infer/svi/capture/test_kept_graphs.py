"""Graphs stay where nothing that matters has changed, and go where they would be wrong."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI, VariationalRenyiELBO
from tests.infer.svi.capture.programs import X, guide, observe


def model(x, scale=1.0):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, scale)


def make(cls, model, guide=guide, lr=0.05, loss=None, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    options = {} if cls is SVI else {"backend": "eager", "audit_every": 8, **options}
    return cls(model, guide, pyro.optim.Adam({"lr": lr}), loss or Trace_ELBO(), **options)


def both(run, **options):
    """The results of a run with SVI and with CompiledSVI."""
    return run(SVI), run(lambda *args, **kw: CompiledSVI(*args, **kw, **options))


class Trainer:
    """A program that holds its own training loop."""

    def __init__(self):
        self.losses, self.rows = [], iter(range(100))
        self.svi = make(CompiledSVI, self.model, self.guide, fallback=False)

    def model(self, x):
        model(x, self.scale())

    def scale(self):
        return getattr(self, "factor", 1.0)

    def guide(self, x):
        guide(x)

    def train(self, num_steps):
        for _ in range(num_steps):
            next(self.rows)
            self.losses.append(self.svi.step(X))


def test_attributes_that_the_programs_do_not_name_may_change():
    trainer = Trainer()
    trainer.train(20)
    assert trainer.svi._graphs.count == 1
    trainer.factor = 2.0
    trainer.train(1)
    assert trainer.svi._graphs.count == 2


def test_gradients_of_tensors_outside_of_the_store_are_kept():
    def run(cls):
        weight = torch.tensor(0.5, requires_grad=True)
        optim = torch.optim.SGD([weight], 0.01)
        svi = make(cls, lambda x: model(x, 1 + weight**2))
        values = []
        for _ in range(10):
            optim.zero_grad()
            svi.step(X)
            optim.step()
            values.append(weight.item())
        return values

    with pytest.warns(UserWarning, match=r"shape \(\) requires gradients, but is not in the param"):
        expected, found = both(run)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "context",
    [
        lambda: poutine.scale(scale=0.5),
        lambda: poutine.mask(mask=False),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)
def test_a_loop_in_a_context_passes_the_audit_after_it(context):
    svi = make(CompiledSVI, model, fallback=False)
    with context():
        for _ in range(11):
            svi.step(X)
    svi.audit()
    assert svi._graphs.count == 1


def test_handlers_made_anew_share_a_graph():
    svi = make(CompiledSVI, model, fallback=False)
    for step in range(12):
        with poutine.scale(scale=0.5 + 0.25 * (step % 2)):
            svi.step(X)
    svi.audit()
    assert svi._graphs.count == 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("size", [3, torch.tensor(3)], ids=["fixed-size", "size-of-data"])
def test_an_error_that_the_program_handles(backend, size):
    ridge = torch.tensor(1.0)

    def with_retry(x):
        eye = torch.eye(int(size))
        matrix = torch.ones(3, 3) + ridge * eye
        try:
            factor = torch.linalg.cholesky(matrix)
        except RuntimeError:
            factor = torch.linalg.cholesky(matrix + eye)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        normal = dist.MultivariateNormal(z.expand(3), scale_tril=factor)
        pyro.sample("x", normal, obs=x.expand(3))

    def run(cls):
        ridge.fill_(1.0)
        svi = make(cls, with_retry, backend=backend)
        losses = []
        for step in range(30):
            if step in (15, 22):
                ridge.fill_(-0.5 if step == 15 else 1.0)
            losses.append(svi.step(X))
        return losses, getattr(svi, "_graphs", svi)

    with pytest.warns(UserWarning, match="takes an eager step: the graph raises _LinAlgError"):
        (expected, _), (found, graphs) = both(run)
    assert found == pytest.approx(expected, rel=1e-5)
    assert graphs.count == 1


def test_one_error_costs_no_graph():
    def picky(x):
        if x.dim() > 0:
            raise ValueError("bad batch")
        model(x)

    svi = make(CompiledSVI, picky)
    for step in range(20):
        if step == 9:
            with (
                pytest.warns(UserWarning, match="bad batch"),
                pytest.raises(ValueError, match="bad"),
            ):
                svi.step(X.expand(3))
        else:
            svi.step(X)
    assert svi._graphs.count == 1
    assert len(svi._warned) == 1


def test_floats_of_numpy_are_floats():
    loss = VariationalRenyiELBO(0.5, 2, max_plate_nesting=0)
    scaled = lambda x, factor: poutine.scale(model, factor)(x)  # noqa: E731
    svi = make(CompiledSVI, scaled, lambda x, factor: guide(x), loss=loss, fallback=False)
    for factor in np.linspace(0.1, 0.9, 12):
        loss.alpha = np.float64(factor)
        svi.step(X, factor)
    assert svi._graphs.count == 1


@pytest.mark.parametrize("kind", [float, np.float64])
def test_floats_that_make_new_tensors_get_graphs_of_their_own(kind):
    def by_tensor(x, factor):
        model(x, torch.tensor([factor, 1.0], dtype=torch.float32).sum())

    def run(cls):
        svi = make(cls, by_tensor, lambda x, factor: guide(x))
        return [svi.step(X, kind(factor)) for factor in (0.2, 0.9, 0.2, 0.9)]

    expected, found = both(run, fallback=False)
    assert found == pytest.approx(expected, rel=1e-6)


def test_equal_settings_share_a_graph():
    config = SimpleNamespace(device=torch.device("cpu"), rows=slice(0, 3), dtype=torch.float32)

    def configured(x):
        model(torch.as_tensor(x, device=config.device, dtype=config.dtype))

    svi = make(CompiledSVI, configured, fallback=False)
    for _ in range(10):
        config.device, config.rows = torch.device("cpu"), slice(0, 3)
        svi.step(X)
    assert svi._graphs.count == 1


def test_eager_steps_after_graphs_are_those_of_svi():
    config = SimpleNamespace(uses_both=True)

    def of_two(x):
        a = pyro.param("a", torch.tensor(0.1))
        b = pyro.param("b", torch.tensor(0.1))
        pyro.sample("z", dist.Normal(a + b if config.uses_both else a, 0.5))

    def run(cls):
        svi = make(cls, model, of_two)
        for step in range(30):
            config.uses_both = step < 12
            svi.step(X)
        return pyro.param("b").item()

    with pytest.warns(UserWarning, match="max_graphs=1"):
        expected, found = both(run, max_graphs=1)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("assign", [False, True])
def test_replaced_parameters_take_effect_at_once(assign):
    def run(cls):
        pyro.set_rng_seed(0)
        net = nn.Linear(1, 1)

        def with_net(x):
            pyro.module("net", net)
            model(x, net(torch.ones(1))[0].exp())

        svi = make(cls, with_net)
        losses = []
        for step in range(20):
            if step == 12 and assign:
                net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True)
            elif step == 12:
                net.weight = nn.Parameter(torch.full((1, 1), 2.0))
            losses.append(svi.step(X))
        return losses

    # Pyro trains the parameter in its store alone, and so do eager steps.
    with pytest.warns(UserWarning, match="requires gradients, but is not in the param store"):
        expected, found = both(run)
    assert found == pytest.approx(expected, rel=1e-4)


def test_programs_that_set_data_take_eager_steps():
    def run(cls):
        average = torch.zeros(())

        def with_average(x):
            model(x - average)
            average.data = 0.9 * average.data + 0.1 * x

        svi = make(cls, with_average)
        return [svi.step(X) for _ in range(4)]

    with pytest.warns(UserWarning, match="sets the data of a tensor"):
        expected, found = both(run)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make_counts", [lambda: [0] * 2000, lambda: np.zeros(20_000)])
def test_large_counters_are_found_and_restored(make_counts):
    counts = make_counts()

    def counting(x):
        counts[0] += 1
        model(x)

    svi = make(CompiledSVI, counting)
    with pytest.warns(UserWarning, match="the model or guide changes 'counts"):
        svi.step(X)
    svi.step(X)
    assert counts[0] == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: net.__delitem__(1),
        lambda net: net.append(nn.Tanh()),
        lambda net: net[0].register_forward_hook(lambda module, args, out: 2 * out),
        lambda net: setattr(net[0], "forward", lambda x: 3 * x),
        lambda net: nn.utils.parametrizations.weight_norm(net[0]),
    ],
)
def test_visible_edits_of_modules_raise_no_alarm(edit):
    def run(cls):
        pyro.set_rng_seed(0)
        net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Tanh()).requires_grad_(False)
        svi = make(cls, lambda x: model(x, net(torch.ones(2))[0].exp()))
        losses = []
        for step in range(24):
            if step == 12:
                edit(net)
                net.requires_grad_(False)
            losses.append(svi.step(X))
        return losses

    expected, found = both(run, fallback=False)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "make_place",
    [
        lambda: ({"a": 2.0, "b": 1.0}, lambda d: d.update(a=d.pop("a"))),
        lambda: ({torch.exp}, lambda s: s.add(torch.tanh)),
    ],
)
def test_other_orders_and_functions_get_another_graph(make_place):
    place, edit = make_place()

    def of_place(x):
        total = torch.ones(())
        for entry in place:
            factor = place[entry] if isinstance(place, dict) else entry(torch.tensor(0.3))
            total = total / 2 + factor
        model(x, total)

    svi = make(CompiledSVI, of_place, fallback=False)
    for step in range(12):
        if step == 6:
            edit(place)
        svi.step(X)
    assert svi._graphs.count == 2


def test_an_audit_creates_no_parameters():
    def late_guide(x):
        guide(x)
        if "begin" in pyro.get_param_store():
            pyro.param("late", lambda: torch.randn(()))

    svi = make(CompiledSVI, model, late_guide, audit_every=1000)
    for _ in range(20):
        svi.step(X)
    svi._graphs._by_key.copy().popitem()[1][0].checked_at = 0
    pyro.param("begin", torch.tensor(0.0))
    with pytest.warns(UserWarning, match="parameter 'late' is used in only one"):
        svi.audit()
    assert sorted(pyro.get_param_store()) == ["begin", "loc"]
