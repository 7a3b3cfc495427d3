import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def fenced_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_python_blocks_run(capsys):
    blocks = fenced_blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "log evidence" in capsys.readouterr().out


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
@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda p: p.stem)
def test_tutorials_run(path, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
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
