import gc
import signal
from zlib import crc32

import pyro
import pytest
import torch

from tests import shapes

shapes.install()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the slow statistical tests")
    parser.addoption("--fast", action="store_true", help="skip the tests that take seconds")
    parser.addoption("--device", default="cpu", help="the device of the tests that take one")


def pytest_configure(config):
    # The networks of the tests are tiny: a second thread costs more than it gives.
    torch.set_num_threads(1)
    # A file of tests that draws at its import draws the same in every run.
    pyro.set_rng_seed(0)


def pytest_collection_modifyitems(config, items):
    without_cuda = pytest.mark.skip(reason="no CUDA device")
    without_slow = pytest.mark.skip(reason="needs --slow")
    without_long = pytest.mark.skip(reason="takes seconds, skipped by --fast")
    not_sampled = pytest.mark.skip(reason="one variant in three runs without --slow")
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(without_cuda)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(without_slow)
        is_sampled = crc32(item.nodeid.encode()) % 3 == 0
        if "sampled" in item.keywords and not is_sampled and not config.getoption("--slow"):
            item.add_marker(not_sampled)
        if "long" in item.keywords and config.getoption("--fast"):
            item.add_marker(without_long)


def pytest_collection_finish(session):
    # What lives until the end need not be searched for garbage during each test.
    gc.collect()
    gc.freeze()


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def clean_state():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    usual = pyro.settings.get()
    yield
    pyro.clear_param_store()
    found = pyro.settings.get()
    pyro.settings.set(**usual)
    by_torch_compile = "validate_distributions_torch"  # its first call turns this off
    assert found | {by_torch_compile: None} == usual | {by_torch_compile: None}


@pytest.fixture
def float64():
    """The default dtype in a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def python_handles_interrupts():
    """A process in the background of a plain shell inherits that they are ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)
