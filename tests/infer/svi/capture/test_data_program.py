"""Programs that read numbers and shapes out of their data get a graph for each of them."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyro_ext.infer import CompiledSVI, EagerSVI, MultiSampleELBO

LENGTHS = [torch.tensor(x) for x in ([3, 1, 2], [2, 2, 1], [1, 3, 3], [2, 1, 1])]
X = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def guide(x, lengths):
    loc = pyro.param("loc", torch.tensor(0.5))
    pyro.sample("z", dist.Normal(loc, 0.8))


def draw():
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def loop(x, lengths):
    z = draw()
    for t in pyro.markov(range(int(lengths.max()))):
        pyro.sample(f"x{t}", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x[:, t])


def loop_over_items(x, lengths):
    z = draw()
    for i, n in enumerate(lengths):
        pyro.sample(
            f"x{i}", dist.Normal(z, 1.0).expand([n.item()]).to_event(1), obs=x[i, : n.item()]
        )


def loop_over_a_list(x, lengths):
    z = draw()
    for i, n in enumerate(lengths.tolist()):
        pyro.sample(f"x{i}", dist.Normal(z, 1.0).expand([n]).to_event(1), obs=x[i, :n])


def array(x, lengths):
    z = draw()
    steps = np.arange(lengths.numpy().max())
    pyro.sample("x", dist.Normal(z, 1.0).expand([3, len(steps)]).to_event(2), obs=x[:, steps])


def branch(x, lengths):
    z = draw()
    scale = 2.0 if lengths.sum() > 5 else 1.0
    pyro.sample("x", dist.Normal(z, scale).expand([3, 4]).to_event(2), obs=x)


def assertion(x, lengths):
    z = draw()
    if lengths.max() > 4:
        raise AssertionError  # an assert statement of a test would name all of pytest
    pyro.sample("x", dist.Normal(z, 1.0).expand([3, 4]).to_event(2), obs=x)


def equality(x, lengths):
    z = draw()
    scale = 2.0 if torch.equal(lengths, LENGTHS[0]) else 1.0
    pyro.sample("x", dist.Normal(z, scale).expand([3, 4]).to_event(2), obs=x)


def mask_of_an_argument(x, lengths):
    z = draw()
    mask = torch.arange(4) < lengths.unsqueeze(-1)
    seen = x[mask]
    pyro.sample("x", dist.Normal(z, 1.0).expand(seen.shape).to_event(1), obs=seen)


def selection(x, lengths):
    z = draw()
    mask = torch.arange(4) < lengths.unsqueeze(-1)
    mean = (x * z).masked_select(mask)
    pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x.masked_select(mask))


def integer_part(x, lengths):
    z = draw()
    for _ in range(int(lengths.float().mean() * 1.01)):
        z = z + 1.0
    pyro.sample("x", dist.Normal(z, 1.0).expand([3, 4]).to_event(2), obs=x)


def mask_filled_in_place(x, lengths):
    z = draw()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1:][lengths > 1] = True
    weights = (x * z)[mask]
    pyro.sample("x", dist.Normal(weights, 1.0).to_event(1), obs=x[mask])


def list_before_a_change(x, lengths):
    z = draw()
    flags = torch.zeros(3, dtype=torch.long)
    flags[1:] = lengths[1:]
    scale = 1.0 + sum(flags.tolist())
    flags.zero_()
    pyro.sample("x", dist.Normal(z + flags.sum(), scale).expand([3, 4]).to_event(2), obs=x)


def indices(x, lengths):
    z = draw()
    rows = (lengths > 1).nonzero().squeeze(-1)
    pyro.sample("x", dist.Normal(z, 1.0).expand([len(rows), 4]).to_event(2), obs=x[rows])


def unique(x, lengths):
    z = draw()
    values, inverse = lengths.unique(return_inverse=True)
    scale = (1.0 + torch.arange(len(values)))[inverse]
    pyro.sample("x", dist.Normal(z, scale.unsqueeze(-1)).expand([3, 4]).to_event(2), obs=x)


def repeated(x, lengths):
    z = draw()
    rows = x.repeat_interleave(lengths, 0)
    pyro.sample("x", dist.Normal(z, 1.0).expand(rows.shape).to_event(2), obs=rows)


def float_of_data(x, lengths):
    z = draw()
    scale = 1.0 + float(lengths.float().mean())
    pyro.sample("x", dist.Normal(z, scale).expand([3, 4]).to_event(2), obs=x)


NETWORK = nn.GRU(1, 2, batch_first=True)


def packed(x, lengths):
    z = draw()
    pyro.module("network", NETWORK)
    sequences = pack_padded_sequence(x.unsqueeze(-1), lengths, True, enforce_sorted=False)
    states, _ = pad_packed_sequence(NETWORK(sequences)[0], batch_first=True, total_length=4)
    pyro.sample("x", dist.Normal(z + states.sum(-1), 1.0).to_event(2), obs=x)


#: name -> (model, the number of graphs for the four pairs of arguments)
READ = {
    "loop": (loop, 2),
    "loop over items": (loop_over_items, 4),
    "loop over a list": (loop_over_a_list, 4),
    "array": (array, 4),
    "branch": (branch, 2),
    "assertion": (assertion, 1),
    "equality": (equality, 2),
    "mask of an argument": (mask_of_an_argument, 4),
    "selection": (selection, 4),
    "integer part": (integer_part, 2),
    "mask, in place": (mask_filled_in_place, 2),
    "list before a change": (list_before_a_change, 4),
    "indices": (indices, 2),
    "unique": (unique, 2),
    "repeated": (repeated, 4),
    "float of data": (float_of_data, 4),
    "packed": (packed, 4),
}


def losses_of(model, make, num_steps=16):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    for p in NETWORK.parameters():
        nn.init.constant_(p, 0.3)
    svi = make(model, guide, pyro.optim.Adam({"lr": 0.03}), pyro.infer.Trace_ELBO())
    return [
        svi.step(X[i % 4], LENGTHS[(i * i) % 4 if i < 8 else i % 4]) for i in range(num_steps)
    ], svi


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READ)
def test_a_graph_for_each_number(name, backend):
    model, num_graphs = READ[name]
    expected, _ = losses_of(model, EagerSVI)

    def compiled(*programs):
        return CompiledSVI(*programs, backend=backend, fallback=False, audit_every=3)

    losses, svi = losses_of(model, compiled)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert svi._graphs.count == num_graphs


def test_numbers_of_constants_are_constants():
    def model(x, lengths):
        z = draw()
        size = torch.tensor(x.shape).prod().item()
        assert isinstance(size, int)
        flat = x.reshape(size)
        pyro.sample("x", dist.Normal(z, 1.0).expand([size]).to_event(1), obs=flat)

    def compiled(*programs):
        return CompiledSVI(*programs, backend="eager", fallback=False)

    losses, svi = losses_of(model, compiled)
    assert losses == pytest.approx(losses_of(model, EagerSVI)[0], rel=1e-5)
    assert svi._graphs.count == 1


class Counter(nn.Module):
    """A module with a buffer that decides about a branch, and perhaps counts calls."""

    def __init__(self, counts):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.counts = counts

    def forward(self, z):
        if self.counts:
            self.count += 1
        return z if self.count < 3 else -z


def test_a_buffer_may_decide_unless_the_run_changes_it():
    def steps(make, counts):
        counter = Counter(counts)

        def model(x, lengths):
            pyro.sample("x", dist.Normal(counter(draw()), 1.0).expand([3]).to_event(1), obs=x[:, 0])

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.03}), pyro.infer.Trace_ELBO())
        losses = []
        for i in range(8):
            losses.append(svi.step(X[0], LENGTHS[0]))
            if not counts and i in (3, 5):
                counter.count.add_(3 if i == 3 else -3)
        return losses, svi

    def compiled(*programs):
        return CompiledSVI(*programs, backend="eager", fallback=False)

    losses, svi = steps(compiled, counts=False)
    assert losses == pytest.approx(steps(EagerSVI, counts=False)[0], rel=1e-5)
    assert svi._graphs.count == 2
    with pytest.raises(RuntimeError, match="uses the value of a tensor in Python code"):
        steps(compiled, counts=True)


def branch_on_a_parameter(x, lengths):
    scale = 2.0 if pyro.param("loc") > 1 else 1.0
    pyro.sample("x", dist.Normal(draw(), scale).expand([3, 4]).to_event(2), obs=x)


def test_a_parameter_may_not_decide():
    def compiled(*programs):
        return CompiledSVI(*programs, backend="eager", fallback=False)

    with pytest.raises(RuntimeError, match="uses the value of a tensor in Python code"):
        losses_of(branch_on_a_parameter, compiled)


def test_too_many_numbers_mean_eager_steps_with_one_warning():
    def compiled(*programs):
        return CompiledSVI(*programs, backend="eager", max_graphs=2)

    with pytest.warns(UserWarning, match="read another number out of their data") as record:
        losses, _ = losses_of(loop_over_a_list, compiled)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert losses == pytest.approx(losses_of(loop_over_a_list, EagerSVI)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([(X[0], n) for n in range(4)], r"args\[1\] has another value"),
        ([(X[0][:n], [n, "a"]) for n in (1, 2, 3)], r"args\[0\] has another shape"),
        ([(X[0], [0, {"n": n}]) for n in range(4)], r"args\[1\]\[1\]\['n'\] has another value"),
    ],
)
def test_the_warning_names_the_argument(arguments, message):
    def model(x, lengths):
        z = draw()
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(2), obs=x)

    pyro.clear_param_store()
    optim = pyro.optim.Adam({"lr": 0.03})
    svi = CompiledSVI(model, guide, optim, pyro.infer.Trace_ELBO(), backend="eager", max_graphs=2)
    for pair in arguments[:2]:
        svi.step(*pair)
    with pytest.warns(UserWarning, match=f"there are max_graphs=2 graphs, and now {message}"):
        svi.step(*arguments[2])
    for pair in arguments[3:]:
        svi.step(*pair)  # without another warning


class HalvedELBO(MultiSampleELBO):
    """A bound with a branch on a float attribute, which is an input of the graph."""

    alpha = 0.0

    def bound(self, log_w):
        return log_w.mean(0) * (0.5 if self.alpha > 0.5 else 1.0)


def test_a_branch_on_an_attribute_of_the_objective_is_followed_at_once():
    def model(x, lengths):
        pyro.sample("x", dist.Normal(draw(), 1.0), obs=x[0, 0])

    losses = []
    for cls, options in ((EagerSVI, {}), (CompiledSVI, {"backend": "eager", "fallback": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = HalvedELBO(2, max_plate_nesting=0)
        svi = cls(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo, **options)
        losses.append([])
        for alpha in (0.1, 0.2, 0.9, 0.8, 0.3, 0.7):
            elbo.alpha = alpha
            losses[-1].append(svi.step(X[0], LENGTHS[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert svi._graphs.count == 2
