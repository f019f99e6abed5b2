"""What studies of this repository run: recordings of a Linux guest and workloads, each with its seeds, in processes."""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from shadowcore import workload
from shadowcore.config import Features
from shadowcore.engine.future import Future
from shadowcore.engine.machine import VM
from shadowcore.recording import replay as trace

RECORDINGS = {
    "linux-mix-pti": None,
    "linux-mix": Path(__file__).resolve().parents[1] / "tests" / "data" / "recordings" / "linux-mix.screc",
}
"""Recordings and their files; None: the one in the package."""


def ran(source, design, *, seed, operations, records, future=None, record_uses=False):
    """(counters, future, most shadow pages in use) of so many operations of a workload, or records of a recording,
    which knows no seed. future, record_uses: as of VM."""
    if source in RECORDINGS:
        recording = trace.open_recording(RECORDINGS[source])
        stop = min(records, recording.operations)
        result = trace.replay(recording, design, stop=stop, future=future, record_uses=record_uses)
        return result.whole.counters, result.future, result.pages_max
    vm = VM(workload.find(source).memory, design, features=Features(), future=future, record_uses=record_uses)
    result = workload.run(source, vm, seed=seed, operations=operations, window=max(1, operations // 100))
    return result.stats, Future.of(vm.mmu) if record_uses else None, result.pages_max


def walked(runs, sources, seeds, processes):
    """The rows of runs(source, seed), of each source (all if none is named) and of `seeds` seeds, in order."""
    jobs = [(source, seed) for source in sources or [*RECORDINGS, *workload.WORKLOADS] for seed in range(seeds)]
    rows = []
    with ProcessPoolExecutor(processes) as pool:
        futures = [pool.submit(runs, *job) for job in jobs]
        for (source, seed), future in zip(jobs, futures, strict=True):
            rows += future.result()
            print(f"{source}, seed {seed}: {len(rows)} rows", file=sys.stderr, flush=True)
    return rows
