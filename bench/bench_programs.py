"""Recorded programs: accesses a second of the survey and of runs on the guest kernel, reading included.

python -m bench.bench_programs [RECORDING]... prints the figures of docs/programs.md.
"""

import sys
import time

import numpy as np
import pytest

from shadowcore import programs
from shadowcore.recordings import Event, Writer

ACCESSES = 1_000_000
DESIGNS = ("native", "flush", "cached")


def write(path, accesses=ACCESSES, pages=500):
    """A loop that fetches, loads from a heap and stores to a stack."""
    rng = np.random.default_rng(0)
    with Writer(path, "program") as writer:
        writer.event(Event.MMAP, 0, addr=0x4800000, size=pages << 12, prot=3, flags=0x22)
        for _ in range(accesses // 10_000):
            op = rng.choice(np.array([2, 0, 1, 3], np.uint8), 10_000, p=[0.7, 0.2, 0.08, 0.02])
            data = 0x4800000 + 8 * rng.integers(0, pages << 9, 10_000)
            stack = 0x1FFEFFE000 + 8 * rng.integers(0, 1500, 10_000)
            addr = np.where(op == 2, 0x401000 + 4 * (np.arange(10_000) % 3000), np.where(op == 0, data, stack))
            writer.write(op=op, size=8, addr=addr.astype(np.uint64))
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write(tmp_path_factory.mktemp("programs") / "loop.screc")


@pytest.mark.benchmark(group="programs")
def test_survey(benchmark, recording):
    found = benchmark.pedantic(lambda: programs.survey(recording), rounds=3)
    assert found.records == ACCESSES


@pytest.mark.benchmark(group="programs")
@pytest.mark.parametrize("design", DESIGNS)
def test_run(benchmark, recording, design):
    found = programs.survey(recording)
    result = benchmark.pedantic(lambda: programs.run(found, design), rounds=3)
    assert result.accesses == ACCESSES
    if benchmark.stats:
        benchmark.extra_info["rate"] = ACCESSES / benchmark.stats.stats.median


def main(paths):
    for path in paths:
        clock = time.perf_counter()
        found = programs.survey(path)
        seconds = time.perf_counter() - clock
        print(f"{found.name}: {found.records:,} accesses, survey {found.records / seconds / 1e6:.1f} M/s")
        for design in DESIGNS:
            best = min(programs.run(found, design).seconds for _ in range(3))
            print(f"  {design}: {found.records / best / 1e6:.1f} M/s")


if __name__ == "__main__":
    main(sys.argv[1:] or [write("loop.screc")])
