"""The time that `import shadowcore` takes beyond numpy's own."""

import subprocess
import sys
from pathlib import Path

import pytest

MOST = 150
"""Milliseconds."""
ROOT = Path(__file__).parent.parent
CODE = """
import time, numpy
before = time.perf_counter_ns()
import shadowcore
print(time.perf_counter_ns() - before)
"""


@pytest.mark.benchmark(group="import")
def test_import(figure):
    """In a new interpreter each time; the modules' files are in the host's cache."""

    def milliseconds():
        done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout) / 1e6

    figure(
        row="I",
        what="import shadowcore, numpy being imported",
        goal=1.0,
        ours=lambda: min(milliseconds() for _ in range(5)),
        yardstick=MOST,
        named=f"the most it may take: {MOST} ms",
        unit="ms",
    )
