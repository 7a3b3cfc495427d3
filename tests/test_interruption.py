"""An interrupt at any moment leaves handlers, settings and random numbers as they were."""

import contextlib
import multiprocessing
import pickle
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.runtime import _DIM_ALLOCATOR

from pyro_ext._interruption import postponed_interrupts
from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext.diagnostics import simulation_based_calibration
from pyro_ext.infer import (
    EagerSVI,
    EvidenceState,
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
    sequential_monte_carlo,
)
from pyro_ext.infer.annealing import annealer

X = torch.linspace(-1.0, 1.0, 4)


pytestmark = pytest.mark.usefixtures("python_handles_interrupts")


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    return z.sum(-1)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 0.8))


def make_guide(conditioned, data):
    def of_data(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("simulations", len(data["x"]), dim=-2), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * data["x"], 0.8))

    return of_data


def make_guide_in_turn(conditioned, data):
    def of_data(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * data["x"], 0.8))

    return of_data


def continued():
    """A call that goes on from a complete state, on random numbers of its own."""
    state = EvidenceState()
    estimate_evidence(model, guide, X, num_samples=2, state=state)
    kept = pickle.dumps(state)
    return lambda: estimate_evidence(model, guide, X, num_samples=4, state=pickle.loads(kept))


CALLS = {
    "evidence": lambda: estimate_evidence(model, guide, X, num_samples=6, chunk_size=2),
    "batches": lambda: estimate_evidence(model, guide, data_loader=X.split(2), num_samples=4),
    "expectation": lambda: estimate_expectation(model, guide, X, num_samples=4, chunk_size=2),
    "annealing": lambda: annealed_importance_sampling(
        model, guide, X, num_chains=4, chunk_size=2, num_temperatures=2, num_leapfrog_steps=1
    ),
    "tempering": lambda: sequential_monte_carlo(
        model,
        guide,
        X,
        num_particles=4,
        num_runs=4,
        chain_length=2,
        target_ess=0.5,
        exact_sample={"z": X / 2},
    ),
    "calibration": lambda: simulation_based_calibration(
        model, make_guide, X, num_simulations=10, num_samples=3, num_steps=3
    ),
    "fits in turn": lambda: simulation_based_calibration(
        model,
        make_guide_in_turn,
        X,
        num_simulations=10,
        num_samples=1,
        num_steps=1,
        vectorize=False,
    ),
}


class Tracer:
    """Counts the lines that run, and sends an interrupt at one of them."""

    def __init__(self, moment=None):
        self.moment = moment
        self.num_lines = 0

    def __call__(self, frame, event, arg):
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.moment:
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, call):
        usual = sys.gettrace()
        sys.settrace(self)
        try:
            return call()
        finally:
            sys.settrace(usual)


def settings():
    """All that a call must leave as it was."""
    return {
        "handlers": list(HANDLER_STACK),
        "dims": list(_DIM_ALLOCATOR._stack),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "settings": pyro.settings.get(),
        "parameters": {name: p.tolist() for name, p in pyro.get_param_store().items()},
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def minibatch():
    with pyro.plate("rows", 1000, subsample_size=5) as rows:
        return rows.tolist()


def outcome(call):
    """The kind of outcome of a call that may be interrupted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except KeyboardInterrupt:
            return "interrupt"
    messages = [str(warning.message) for warning in caught]
    if any("was interrupted. The " in message for message in messages):
        return "result"
    return f"no word of it: {messages}"


@pytest.mark.long
@pytest.mark.parametrize("name", [*CALLS, "continued"])
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(name, request, monkeypatch):
    monkeypatch.setattr(annealer, "NUM_WARMUP", 1)
    call = continued() if name == "continued" else CALLS[name]
    call()
    tracer = Tracer()
    pyro.set_rng_seed(0)  # the number of lines may depend on the draws
    tracer.run(call)
    moments = range(1, tracer.num_lines + 1, 1 + tracer.num_lines // 5_000)
    if not request.config.getoption("--slow"):
        # The first line is before the call can postpone an interrupt.
        moments = sorted({1, *random.Random(0).sample(moments, 59)})
    before, tally = settings(), Counter()
    for moment in moments:
        pyro.set_rng_seed(0)
        numbers = torch.get_rng_state()
        tracer = Tracer(moment)
        kind = outcome(lambda tracer=tracer: tracer.run(call))
        # A later call may run fewer lines, because something is known from an earlier one.
        tally[kind if tracer.num_lines >= moment else "complete"] += 1
        assert settings() == before, moment
        if name == "continued":
            assert torch.equal(torch.get_rng_state(), numbers), moment
        assert minibatch() != minibatch(), moment
    print(f"{name}: {len(moments)} moments, {dict(tally)}")
    assert set(tally) - {"complete"} == {"interrupt", "result"}
    assert tally["complete"] < 0.1 * len(moments)


@pytest.mark.long
def test_an_interrupted_load_restores_all_or_nothing(tmp_path):
    def make():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return EagerSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    svi = make()
    svi.run(3, 1, False, args=(X,), checkpoint=tmp_path / "run")
    loaded = pyro.param("loc").item(), len(svi.history.losses)

    def load():
        svi.load(tmp_path / "run", X)

    svi = make()
    tracer = Tracer()
    tracer.run(load)
    tally = Counter()
    for moment in sorted(random.Random(0).sample(range(1, tracer.num_lines), 120)):
        svi = make()
        svi.step(X)
        before = pyro.param("loc").item(), 0
        tracer = Tracer(moment)
        with contextlib.suppress(KeyboardInterrupt):
            tracer.run(load)
            assert tracer.num_lines < moment
        found = pyro.param("loc").item(), len(svi.history.losses)
        assert found in (before, loaded), moment
        assert list(HANDLER_STACK) == []
        tally[found == loaded] += 1
    print(f"loads: {dict(tally)}")
    assert tally[True] > 10


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_is_raised_at_once():
    def block():
        with postponed_interrupts() as interrupts:
            assert not interrupts
            interrupt()
            assert interrupts
            interrupt()
            raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        block()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    chunks = []

    def interrupted_twice(x):
        chunks.append(len(chunks))
        if len(chunks) > 2:
            interrupt()
            interrupt()
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        estimate_evidence(interrupted_twice, guide, X, num_samples=9, chunk_size=1)
    assert len(chunks) == 3


def test_an_interrupt_that_no_safe_point_saw_is_raised_after_the_block():
    done = []

    def block(error=None):
        with postponed_interrupts():
            interrupt()
            done.append("block")
            if error is not None:
                raise error
        done.append("more")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["block"]
    with pytest.raises(KeyboardInterrupt) as raised:
        block(ValueError())
    assert isinstance(raised.value.__context__, ValueError)


def test_a_loader_that_fails_from_an_interrupt_is_interrupted():
    def batches(is_interrupted):
        yield X[:2]
        if is_interrupted:
            interrupt()
        raise RuntimeError("a worker was killed")

    with pytest.warns(UserWarning, match="uses 4 of 4 draws and 2 data points"):
        found = estimate_evidence(model, guide, data_loader=batches(True), num_samples=4)
    assert found.log_evidence.shape == (2,)
    with pytest.raises(RuntimeError, match="a worker was killed"):
        estimate_evidence(model, guide, data_loader=batches(False), num_samples=4)


def test_other_threads_and_ignored_signals_are_left_alone():
    found = []

    def ask():
        with postponed_interrupts() as interrupts:
            found.append((bool(interrupts), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ask()
    assert found == [(False, signal.default_int_handler), (False, signal.SIG_IGN)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_can_be_terminated():
    forks = multiprocessing.get_context("fork")
    is_running = forks.Event()

    def wait():
        is_running.set()
        time.sleep(60)

    with postponed_interrupts(signal.SIGINT, signal.SIGTERM) as interrupts:
        child = forks.Process(target=wait)
        child.start()
        assert is_running.wait(30)  # Python drops a signal that comes during the fork
        child.terminate()
        child.join(30)
        assert (child.exitcode, bool(interrupts)) == (-signal.SIGTERM, False)


def test_another_signal_goes_to_the_handler_of_the_user():
    received = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with postponed_interrupts(signal.SIGINT, signal.SIGTERM) as interrupts:
            signal.raise_signal(signal.SIGTERM)
            assert received == []
            interrupts.deliver()
            assert (received, bool(interrupts)) == ([signal.SIGTERM], False)
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, usual)


@pytest.mark.parametrize("name", ["evidence", "annealing"])
def test_an_interrupt_in_the_callback_of_a_run_ends_both(name, tmp_path):
    """Evidence returns what it has; annealing has nothing. The run then writes its checkpoint."""
    found = []

    def interrupted(x):
        if not found:
            found.append(None)
            interrupt()
        return model(x)

    def callback(history):
        if len(history.losses) == 2:
            if name == "annealing":
                found.append(annealed_importance_sampling(interrupted, guide, X))
            with pytest.warns(UserWarning, match="uses 2 of 6 draws"):
                found.append(estimate_evidence(interrupted, guide, X, num_samples=6, chunk_size=2))

    def run(**options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = EagerSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        return svi.run(4, 1, False, args=(X,), **options)

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt) as raised:
        run(checkpoint=path, callback=callback)
    assert type(raised.value) is KeyboardInterrupt
    assert len(found) == 1 + (name == "evidence")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(run(resume=path).losses) == 4
    steps = []
    run(resume=path, callback=lambda history: steps.append(len(history.losses)))
    assert steps == [3, 4]
