"""The project of ten tasks: exact figures, and the errors that estimates report."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

PATH = Path(__file__).parent.parent / "tutorials" / "importance_sampling.py"
SPEC = importlib.util.spec_from_file_location("rare_events", PATH)
project = importlib.util.module_from_spec(SPEC)
sys.path.insert(0, str(PATH.parent))  # for figure_style
SPEC.loader.exec_module(project)


def test_the_chain_gives_the_published_figures():
    """Owen, Monte Carlo, chapter 9; standard errors at 10,000 draws."""
    assert pytest.approx(3.211525e-5, rel=1e-6) == project.EXACT
    published = {
        "plain Monte Carlo": 5.67e-5,
        "all tasks x 4": 1.92e-5,
        "critical path x 2": 3.78e-6,
        "critical path x 3": 3.32e-6,
        "critical path x 4": 4.37e-6,
    }
    for name, error in published.items():
        assert project.EXACT_DEVIATIONS[name] / 100 == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("name", project.FACTORS)
def test_estimates_are_within_their_exact_errors(name):
    found = project.estimate(project.GUIDES[name], 50_000)
    error = project.EXACT_DEVIATIONS[name] / 50_000**0.5
    assert abs(found.value - project.EXACT) < 4.5 * error


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "num_samples", "tolerance"),
    [("plain Monte Carlo", 4_000_000, 0.25), ("critical path x 2", 1_000_000, 0.4)],
)
def test_reported_errors_are_near_the_exact_ones(name, num_samples, tolerance):
    found = project.estimate(project.GUIDES[name], num_samples)
    error = project.EXACT_DEVIATIONS[name] / num_samples**0.5
    print(f"{name}: reported {found.std_error:.3g}, exact {error:.3g}")
    assert abs(found.value - project.EXACT) < 4.5 * error
    assert found.std_error == pytest.approx(error, rel=tolerance)
