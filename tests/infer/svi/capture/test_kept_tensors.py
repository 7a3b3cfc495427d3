"""A tensor that programs leave in an attribute in each run is left there by graphs, too."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI, compile_elbo

X = torch.linspace(-1.0, 2.0, 4)
KEPT = torch.zeros(())


class Programs(nn.Module):
    """Programs that keep a draw and a function of the data."""

    def __init__(self, reads_the_last=False):
        super().__init__()
        self.reads_the_last = reads_the_last
        self.last = {"mean": torch.zeros(())}
        self.z = self.mean = torch.zeros(())

    def model(self, x):
        shift = self.last["mean"] if self.reads_the_last else 0.0
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        self.mean = x.mean()
        self.last["mean"] = x.mean() * 2
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.z + shift, 1.0), obs=x - self.mean)
        return z

    def guide(self, x):
        loc = pyro.param("loc", torch.tensor(0.3))
        self.z = pyro.sample("z", dist.Normal(loc, 0.5))


def run(cls, programs, num_steps=12, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = cls(
        programs.model, programs.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options
    )
    seen = []
    for i in range(num_steps):
        loss = svi.step(X + i)
        seen.append((loss, programs.z.item(), programs.mean.item(), programs.last["mean"].item()))
    return seen


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_graphs_leave_what_the_programs_leave(backend):
    expected = run(SVI, Programs())
    programs = Programs()
    found = run(CompiledSVI, programs, backend=backend, fallback=False)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert not programs.z.requires_grad


def test_a_tensor_that_is_read_before_it_is_replaced_needs_eager_steps():
    with pytest.raises(RuntimeError, match=r"the model or guide changes '.*last.*'"):
        run(CompiledSVI, Programs(reads_the_last=True), backend="eager", fallback=False)
    expected = run(SVI, Programs(reads_the_last=True))
    with pytest.warns(UserWarning, match=r"the model or guide changes '.*last.*'"):
        found = run(CompiledSVI, Programs(reads_the_last=True), backend="eager")
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_loop_may_differentiate_a_draw_that_is_kept():
    programs = Programs()
    pyro.clear_param_store()
    elbo = compile_elbo(Trace_ELBO(), backend="eager")(programs.model, programs.guide)
    elbo(X).backward()
    with pytest.warns(UserWarning, match=r"compile_elbo .* changes 'Programs.z'"):
        elbo(X)
    assert programs.z.requires_grad
    with torch.no_grad():  # nothing can differentiate it now
        losses = [elbo(X) for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)
    assert [graph.has_gradients for graph in elbo.capture_report().graphs] == [False]


class Base(nn.Module):
    """A model and guide. Subclasses leave something in the attribute ``kept``."""

    def __init__(self):
        super().__init__()
        self.kept = torch.zeros(())
        self.cache = {}

    def model(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        return pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))


class DrawForTheUser(Base):
    def guide(self, x):
        self.kept = super().guide(x)


class GlobalForTheUser(Base):
    def guide(self, x):
        global KEPT
        KEPT = super().guide(x)

    def __getattribute__(self, name):
        return KEPT if name == "kept" else super().__getattribute__(name)


class Argument(Base):
    def guide(self, x):
        self.kept = x
        super().guide(x)

    def model(self, x):
        super().model(self.kept)


class ViewOfArgument(Base):
    def guide(self, x):
        self.kept = x[1:]
        super().guide(x)


class ReassignedBuffer(Base):
    def __init__(self):
        super().__init__()
        del self.kept
        self.register_buffer("kept", torch.zeros(()))

    def guide(self, x):
        self.kept = super().guide(x) * 2


class ViewOfWrittenBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def guide(self, x):
        self.kept = self.mean.mul_(0.9).add_(x.mean())[1:]
        super().guide(x)


class FilledCache(Base):
    """The first run with a shape has more operations than the later ones."""

    def guide(self, x):
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.arange(len(x)) * 2.0
        self.kept = super().guide(x) + self.cache[len(x)].sum()


class PreviousArgument(Base):
    def guide(self, x):
        loc = pyro.param("loc", torch.tensor(0.3)) + self.kept.mean()
        self.kept = x
        pyro.sample("z", dist.Normal(loc, 0.5))


class ShiftedDraws(Base):
    def guide(self, x):
        self.cache["last"] = self.kept
        self.kept = super().guide(x)


class Pair(Base):
    def guide(self, x):
        self.kept = (super().guide(x), x.mean())


KEPT_BY_GRAPHS = [
    DrawForTheUser,
    GlobalForTheUser,
    Argument,
    ViewOfArgument,
    ReassignedBuffer,
    ViewOfWrittenBuffer,
    FilledCache,
]
NEEDING_EAGER_STEPS = [PreviousArgument, ShiftedDraws, Pair]


def leaves(kept):
    return kept if isinstance(kept, tuple) else (kept,)


def losses_and_kept(cls, programs, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = cls(
        programs.model, programs.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options
    )
    seen = []
    for i in range(20):
        seen.append(torch.tensor(svi.step(X[i // 10 :] + i)))
        seen += [x.detach().clone() for x in leaves(programs.kept)]
    if cls is CompiledSVI:
        svi.audit()
    seen += leaves(programs.kept)
    return seen, svi


@pytest.mark.filterwarnings("ignore:CompiledSVI takes eager steps")
@pytest.mark.parametrize("cls", KEPT_BY_GRAPHS + NEEDING_EAGER_STEPS)
def test_attributes_are_those_of_pyro_after_each_step_and_audit(cls):
    expected, _ = losses_and_kept(SVI, cls())
    found, svi = losses_and_kept(CompiledSVI, cls(), backend="eager")
    torch.testing.assert_close(found, expected)
    assert bool(svi.capture_report().graphs) == (cls in KEPT_BY_GRAPHS)


class KeptFloat(Base):
    def guide(self, x, scale):
        self.kept = scale
        super().guide(x)

    def model(self, x, scale):
        super().model(x * self.kept)


def test_a_float_in_an_attribute_stays_a_float():
    programs = KeptFloat()
    pyro.clear_param_store()
    svi = CompiledSVI(
        programs.model, programs.guide, pyro.optim.Adam({}), Trace_ELBO(), backend="eager"
    )
    for i in range(6):
        scale = 1.0 + i % 2
        svi.step(X, scale)
        assert type(programs.kept) is float
        assert programs.kept == scale
