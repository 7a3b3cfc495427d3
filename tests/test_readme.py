import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(
    path for path in (ROOT / "tutorials").glob("*.py") if path.stem != "figure_style"
)


def fenced_blocks(language):
    blocks, inside = [], None
    for line in (ROOT / "README.md").read_text().splitlines(keepends=True):
        if line.startswith("```") and inside is None:
            inside = line[3:].strip()
            blocks.append((inside, ""))
        elif line.startswith("```"):
            inside = None
        elif inside is not None:
            blocks[-1] = inside, blocks[-1][1] + line
    return [text for name, text in blocks if name == language]


@pytest.mark.long
def test_python_blocks_run(capsys):
    blocks = fenced_blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "log evidence" in capsys.readouterr().out


@pytest.mark.long
def test_the_output_is_the_one_that_is_shown(capsys):
    for block in fenced_blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    shown = fenced_blocks("")[0]
    numbers = re.compile(r"-?\d+(\.\d+)?")  # other machines may round otherwise
    assert numbers.sub("#", printed) == numbers.sub("#", shown)


def test_it_is_short_and_shows_the_change_first():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert any("Trace_ELBO" in line and line.startswith("-") for line in lines[:40])


def test_the_first_two_sh_blocks_are_the_two_commands():
    main, tests = fenced_blocks("sh")[:2]
    assert "tutorials/quickstart.py" in main.splitlines()[-1]
    assert "pytest" in tests.splitlines()[-1]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.slow  # the build of the documentation runs them too
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run(path, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    if "import LightningModule" in path.read_text():
        pytest.importorskip("lightning")
    figure = tmp_path / "figure.png"
    command = [
        sys.executable,
        "-W",
        "error",
        str(path),
        "--smoke",
        "--no-progress-bar",
        "--output",
        str(figure),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert figure.stat().st_size > 10_000
