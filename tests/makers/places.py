"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
DATA = TESTS / "data"
GOLDEN = TESTS / "golden"
LINUX_FORK = DATA / "recordings" / "linux-fork.npz"  # a recording of version 1: boot and 60 pipelines, no fetches
LINUX_MIX = DATA / "recordings" / "linux-mix.screc"  # the guest of the package's recording, without isolation
