"""No forged file of a saved machine crashes or hangs the loader: it is refused, or it is a machine that works."""

import subprocess
import sys
from pathlib import Path

import forged
import pytest

PROGRAM = Path(forged.__file__)


def loads(name, first, step):
    """Load every `step`-th forgery of a machine from number `first` on, in a process of its own."""
    command = [sys.executable, str(PROGRAM), name, str(first), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert "without its file" not in lines[-1]
    assert lines[-1].startswith("done "), f"{lines[-1]}: status {done.returncode}, {done.stderr[-2000:]}"
    return lines


@pytest.mark.parametrize("name", forged.MACHINES)
def test_a_sample_of_forged_files(name):
    lines = loads(name, 5, 151)
    assert len(lines) > 30
    assert "SnapshotError" in lines[-1]
    assert "loaded" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", forged.MACHINES)
def test_every_forged_file(name):
    loads(name, 0, 1)
