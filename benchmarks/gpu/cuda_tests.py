"""The tests that need a CUDA device, in a process of their own.

Meanwhile another process compiles what the later parts need, into the compiler's cache on disk.
"""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.steps import compile_ahead
from benchmarks.harness import Options

ROOT = Path(__file__).parents[2]
PATHS = "tests/test_cuda.py", "tests/distributed/test_gpu.py"


def run_tests(options: Options, clock: Clock) -> Iterator[str]:
    """Says how many tests passed, and which failed."""
    context = multiprocessing.get_context("spawn")
    compiler = context.Process(target=compile_ahead, args=(options.device, clock.is_rehearsal))
    compiler.start()
    try:
        if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
            compiler.join(clock.left)
            yield "Left out: pytest or the folder of the tests is not there."
        else:
            yield outcome(clock)
    finally:
        code = compiler.exitcode
        compiler.terminate()
        compiler.join()
    state = "was stopped" if code is None else f"ended with code {code}"
    yield f"The process that compiles the steps of later parts {state} after {clock.passed:.0f} s."


def outcome(clock: Clock) -> str:
    """The summary of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *PATHS]
    command += ["-o", "filterwarnings="]  # a warning of another version of torch is no failure
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4"]
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTEST_ADDOPTS": ""},  # such as coverage, in a test of this
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(max(clock.left, 0))
            end = f"pytest ended with code {process.returncode} after {clock.passed:.0f} s."
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"pytest was stopped after {clock.passed:.0f} s."
        file.seek(0)
        lines = file.read().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    has_run = process.returncode in (0, 1, 5)  # passed, failed, no tests
    shown = [f"    {line}" for line in (*failures, *lines[-3 if has_run else -20 :])]
    return "\n".join([f"    python {' '.join(command[1:])}", "", end, "", *shown])
