import pytest
from torch import distributed

from tests.distributed.pool import Pool

if not distributed.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pools():
    """Pools of processes by their number. A pool starts when a test first asks for it."""
    started = {}

    def of_size(size):
        if size not in started:
            started[size] = Pool(size)
        return started[size]

    yield of_size
    for pool in started.values():
        pool.close()
