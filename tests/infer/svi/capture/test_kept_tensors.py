"""A tensor that programs leave in an attribute in each run is left there by graphs, too."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI, compile_elbo

X = torch.linspace(-1.0, 2.0, 4)


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
