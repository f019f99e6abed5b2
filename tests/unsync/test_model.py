"""The plain Python model of Linux's shadow MMU equals the real one, also where the engine has no such host yet: pages
that come and go, slots that change."""

import subprocess
import sys

import pytest
from places import ROOT

MODEL = ROOT / "tests" / "models" / "linux_shadow"
DATA = ROOT / "tests" / "data"
# Their operations are those of a stream that is not among the data.
WITHOUT_BASE = ("dirtylog_pingpong_n5",)
STREAMS = [
    f"{folder}/{path.stem}"
    for folder in ("kvm-6.1", "kvm-6.12", "kvm-6.1-more")
    for path in sorted((DATA / folder).glob("*.npz"))
    if not path.name.startswith(WITHOUT_BASE)
]
QUICK = ("kvm-6.1-more/back_64_s1.warm4K", "kvm-6.1-more/slots_64_s4.warm4K")

CASES = [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in STREAMS]


@pytest.mark.parametrize("stream", CASES)
def test_the_model_is_exact(stream):
    done = subprocess.run([sys.executable, "replay.py", stream], cwd=MODEL, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split()[-1] == "exact", done.stdout
