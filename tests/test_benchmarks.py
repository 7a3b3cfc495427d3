"""The benchmarks' own tools."""

import json
import time
from importlib import import_module

import pytest
import torch

pytest.importorskip("matplotlib")
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
