"""The same work in threads and in processes, for bench_threads.py; `python -m bench.scaling` is one of the processes.

A process answers each line that it reads, a number of rounds, with when it began them and when it was done, in
nanoseconds of the clock that all processes of a machine share.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import shadowcore as sc

sys.path.insert(0, str(Path(__file__).parent))

from guests import PAGE, Guest, accesses, pages

PAGES = 4096
OPERATIONS = 12 * PAGES


class Work:
    """A VM of its own, and a batch: its shadow is dropped by a store flood and built anew, and then hit."""

    def __init__(self, seed: int) -> None:
        shadow = sc.Shadow.cached(pool_pages=64, flood_threshold=1)
        self.guest = Guest("64", PAGES * PAGE, shadow).map().map_tables().start()
        rng = np.random.default_rng(seed)
        tables = self.guest.leaf_tables(0, PAGES * PAGE)
        floods = accesses(self.guest.edit_address(tables), sc.Op.WRITE, user=0)
        floods["value"] = self.guest.vm.memory.words[tables // np.uint64(8)]
        hits = accesses(rng.choice(pages(PAGES), OPERATIONS - PAGES - len(tables)))
        self.ops = np.concatenate([floods, accesses(rng.permutation(pages(PAGES))), hits])
        assert len(self.ops) == OPERATIONS
        self.rounds(1)  # the first stores meet no shadow

    def rounds(self, count: int) -> None:
        for _ in range(count):
            result = self.guest.run(self.ops, data=True)
            assert not result.outcome.any()
        # The pages of the tables themselves are mapped once more after each flood.
        assert PAGES <= result.stats.exits["fill"] <= PAGES + PAGES // 512


def span(times: list[tuple[int, int]]) -> int:
    """From the first beginning to the last end."""
    return max(end for _, end in times) - min(begin for begin, _ in times)


class Threads:
    """As many VMs as threads, in this process."""

    def __init__(self, count: int) -> None:
        self.works = [Work(seed) for seed in range(count)]

    def __call__(self, rounds: int) -> int:
        """Nanoseconds that all took together for so many rounds each."""
        barrier = threading.Barrier(len(self.works))
        times: list[tuple[int, int]] = []

        def run(work: Work) -> None:
            barrier.wait()
            begin = time.monotonic_ns()
            work.rounds(rounds)
            times.append((begin, time.monotonic_ns()))

        threads = [threading.Thread(target=run, args=(work,)) for work in self.works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(times) == len(threads)  # none raised
        return span(times)


class Processes:
    """The same VMs, each in a process of its own."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-m", "bench.scaling"]
        self.children = [
            subprocess.Popen(
                [*command, str(seed)],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            for seed in range(count)
        ]
        for child in self.children:
            assert child.stdout.readline() == "ready\n"

    def __call__(self, rounds: int) -> int:
        for child in self.children:
            child.stdin.write(f"{rounds}\n")
        times = []
        for child in self.children:
            begin, end = map(int, child.stdout.readline().split())
            times.append((begin, end))
        return span(times)

    def close(self) -> None:
        for child in self.children:
            child.stdin.close()
            assert child.wait() == 0


def main() -> None:
    work = Work(int(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.monotonic_ns()
        work.rounds(int(line))
        print(begin, time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    main()
