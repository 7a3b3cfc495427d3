import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if BLOCK.search(path.read_text())]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*Pareto k:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:(sequential_monte_carlo|annealed_importance_sampling). (prior|gap):UserWarning"
)
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(path):
    namespace = {}
    for block in BLOCK.findall(path.read_text()):
        exec(compile(block, str(path), "exec"), namespace)
