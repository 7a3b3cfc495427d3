"""The benchmarks' own tools."""

import json
import re
import time
from importlib import import_module

import pytest
import torch

from benchmarks.__main__ import SUITES
from benchmarks.harness import Options, Spread, Table, compare, geometric_mean, peak_bytes

OPTIONS = Options(torch.device("cpu"), quick=True)


@pytest.mark.long
def test_times_in_turns_and_as_ratios():
    steps = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}
    found = compare(steps, OPTIONS, seconds=0.0)
    assert found["short"][1] == Spread(1.0, 1.0, 1.0)
    milliseconds, ratio = found["long"]
    assert milliseconds.median >= 6.0
    assert ratio.lower <= ratio.median <= ratio.upper
    assert 1.0 < ratio.median <= 3.5


def test_counts_the_peak_of_memory():
    def step():
        first = torch.empty(1000, 1000)
        del first
        second = torch.empty(2000, 1000)
        third = torch.empty(500, 1000)
        return second, third

    step()
    assert peak_bytes(step, OPTIONS.device) == pytest.approx(4 * 2500 * 1000, rel=0.01)


def test_tables_are_printed_recorded_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    spread = Spread(1.5, 1.25, 1.75)
    table = Table(
        "Title", ["name", "ratio"], [["a", spread], ["b", 2.0]], "A note.", (["name"], "ratio")
    )
    assert "| a | 1.5 (1.25 to 1.75) |" in table.markdown()
    assert table.markdown().endswith("A note.\n")
    record = json.loads(json.dumps(table.record()))
    assert record["rows"][0] == {
        "name": "a",
        "ratio": {"median": 1.5, "lower": 1.25, "upper": 1.75},
    }
    table.draw(tmp_path)
    assert (tmp_path / "title.png").stat().st_size > 1000


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("suite", SUITES)
def test_suites_have_tables(suite):
    assert callable(import_module(f"benchmarks.{suite}").tables)


def test_the_subset_matrix_is_the_jackknife():
    from benchmarks.jackknife_orders import SubsetMatrix
    from pyro_ext.ops import jackknife

    log_w = torch.randn(8, 5, dtype=torch.float64)
    matrix = SubsetMatrix(8, 2, torch.device("cpu"))
    matrix.log_matrix, matrix.weights = matrix.log_matrix.double(), matrix.weights.double()
    torch.testing.assert_close(matrix(log_w), jackknife(log_w, 2), rtol=1e-5, atol=1e-4)


def test_the_plain_step_is_the_importance_weighted_step():
    import pyro

    from benchmarks.plain_steps import plain_step
    from benchmarks.vae import VAE, random_images
    from pyro_ext.infer import ImportanceWeightedELBO

    images = random_images(4, torch.device("cpu"))
    torch.manual_seed(0)
    step = plain_step(images, 3)
    torch.manual_seed(0)
    vae = VAE("plain")
    torch.manual_seed(1)
    found = step()
    torch.manual_seed(1)
    elbo = ImportanceWeightedELBO(3, max_plate_nesting=1)
    with pyro.validation_enabled(False):
        expected = elbo.loss(vae.model, vae.guide, images)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_matmuls_have_the_floating_point_operations_of_the_step():
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.plain_steps import matmuls, plain_step
    from benchmarks.vae import random_images

    images = random_images(4, torch.device("cpu"))
    found = []
    for make in (matmuls, plain_step):
        step = make(images, 3)
        with FlopCounterMode(display=False) as counter:
            step()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def branch_on_a_value(x):
    return 1 if x.sum() > 0 else 2


@pytest.mark.parametrize(
    ("program", "operations", "syncs"),
    [
        (lambda x: x.exp() + 1, 2, 0),
        (lambda x: x.view(2, 3).T.expand(2, 3, 2).detach(), 0, 0),
        (lambda x: torch.empty_like(x).fill_(1.0), 1, 0),
        (lambda x: x.sum().item(), 1, 1),
        (branch_on_a_value, 2, 1),
        (lambda x: x.nonzero(), 0, 1),
        (lambda x: x[x > 0], 1, 1),
        (lambda x: x[torch.tensor([0, 1])], 1, 0),
        (lambda x: torch.equal(x, x), 0, 1),
        (lambda x: torch.linalg.cholesky(torch.eye(3)), 2, 1),
    ],
)
def test_counts_operations_and_synchronisations(program, operations, syncs):
    from benchmarks.counting import CountingMode

    x = torch.arange(6.0)
    for is_inference in (False, True):
        with torch.inference_mode(is_inference), CountingMode(torch.device("cpu")) as counts:
            program(x)
        assert (counts.operations.total(), counts.syncs.total()) == (operations, syncs)


def test_copies_to_the_host_are_synchronisations_unless_they_do_not_block():
    from benchmarks.counting import CountingMode

    x = torch.empty(6, device="meta")
    y = torch.empty(6)
    with CountingMode(torch.device("meta")) as counts:
        x.copy_(y)
        y.to("meta")
        x.copy_(x)
    assert counts.syncs == {"aten.copy_.default": 1, "aten._to_copy.default": 1}
    with CountingMode(torch.device("meta")) as counts:
        x.copy_(y, non_blocking=True)
        y.exp().to("meta", non_blocking=True)
    assert not counts.syncs
    assert counts.operations.total() == 2


def test_an_eager_step_waits_for_its_loss_alone_without_validation():
    import pyro
    from pyro.infer import SVI

    from benchmarks.counts import counts_of_step, step_of
    from benchmarks.vae import random_images
    from pyro_ext.infer import ImportanceWeightedELBO

    images = random_images(4, OPTIONS.device)
    elbo = ImportanceWeightedELBO(3, max_plate_nesting=1)
    with pyro.validation_enabled(False):
        operations, syncs = counts_of_step(step_of(SVI, elbo, images), OPTIONS.device)
    assert syncs == 1
    assert 100 < operations < 250


def part(title, run, until=1.0, needs=0.0):
    from benchmarks.gpu.kit import Part

    return Part(title, until, needs, run)


def run_kit(parts, folder, seconds=5.0):
    from benchmarks.gpu.kit import run

    path = run(parts, OPTIONS.device, True, seconds, folder)
    assert path == folder / "RESULTS-GPU.md"
    return path.read_text()


def test_the_gpu_kit_names_what_it_leaves_out(tmp_path):
    from benchmarks.gpu.kit import PARTS

    text = run_kit(PARTS, tmp_path, seconds=1.0)
    for title, *_ in PARTS:
        assert f"## {title}\n\nLeft out: it needs about" in text


def test_the_gpu_kit_writes_after_each_piece_and_goes_on_after_an_error(tmp_path):
    table = Table("Title", ["name", "ratio"], [["a", 1.0]])
    seen = []

    def look():
        seen.append((tmp_path / "RESULTS-GPU.md").read_text())

    def first(options, clock):
        assert options.quick
        yield table
        look()
        table.rows.append(["b", 2.0])
        yield table
        look()
        raise MemoryError("too large\nby far")

    def second(options, clock):
        yield "A paragraph."

    text = run_kit([part("First", first), part("Second", second)], tmp_path)
    assert "| a | 1 |" in seen[0]
    assert "| b | 2 |" in seen[1]
    assert text.count("### Title") == 1
    assert "Stopped by an error. MemoryError: too large\n" in text
    assert "## Second\n\nA paragraph." in text


def test_a_size_that_would_take_too_long_is_left_out():
    from benchmarks.gpu.clock import Clock

    clock = Clock(time.perf_counter() + 0.5, True)
    left_out = []
    for _ in clock.select(range(5), left_out):
        time.sleep(0.2)
    assert left_out == [2, 3, 4]


def test_the_gpu_kit_measures_steps(monkeypatch):
    from benchmarks.gpu import steps
    from benchmarks.gpu.clock import Clock

    def makers(images, K):
        def fail():
            raise RuntimeError("out of memory")

        return {
            "matmuls alone": lambda: lambda: time.sleep(0.001),
            "CompiledSVI": lambda: lambda: time.sleep(0.002),
            "CompiledSVI, CUDA graphs": fail,
        }

    monkeypatch.setattr(steps, "implementations", makers)
    monkeypatch.setattr(steps, "REHEARSAL", steps.QUICK[:2])
    options = Options(OPTIONS.device, True, 0.01)
    table, *_, of_compiled = steps.training_steps(options, Clock(time.perf_counter() + 60, True))
    assert [row[:3] for row in table.rows][:2] == [[20, 5, "matmuls alone"], [20, 5, "CompiledSVI"]]
    assert "CompiledSVI, CUDA graphs at (20, 5): RuntimeError: out of memory." in table.note
    assert "for matmuls alone (geometric mean over (batch, K) = (20, 5), (20, 50))" in of_compiled


@pytest.mark.slow
def test_the_gpu_kit_runs_the_tests_of_a_device(tmp_path):
    from benchmarks.gpu.cuda_tests import run_tests

    text = run_kit([part("Tests", run_tests)], tmp_path, seconds=60.0)
    assert "pytest ended with code 0" in text
    assert re.search(r"    \d+ (skipped|passed).* in ", text)
    assert re.search(r"later parts (was stopped|ended with code 0) after", text)


def test_the_recipes_of_the_scale_mixture_agree(monkeypatch):
    from benchmarks.gpu import scale_mixture
    from pyro_ext.distributions import NormalScaleMixture

    scales, probs = map(torch.tensor, (scale_mixture.SCALES, scale_mixture.PROBS))
    weights = torch.randn(20)
    mixture = NormalScaleMixture(scales, probs=probs)
    torch.testing.assert_close(scale_mixture.usual_recipe(weights), mixture.log_prob(weights))
    monkeypatch.setitem(scale_mixture.NUM_WEIGHTS, "cpu", (1000,))
    (table,) = scale_mixture.tables(Options(OPTIONS.device, True, 0.01))
    assert len(table.rows) == 3
