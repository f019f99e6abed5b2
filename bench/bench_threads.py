"""VMs in threads of one process, against the same VMs in as many processes: what the GIL costs."""

import os

import pytest
from scaling import OPERATIONS, Processes, Threads

ROUNDS = 20
"""Batches of a measurement."""


@pytest.fixture
def all_cpus(cpus):
    """The benchmarks stay on one CPU; these are of several."""
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count()
        return
    one = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    yield len(cpus)
    os.sched_setaffinity(0, one)


@pytest.mark.benchmark(group="threads")
def test_threads(side_by_side, all_cpus):
    """As many VMs as there are CPUs, four at most: their throughput in threads is 95 % of that in processes."""
    count = min(4, all_cpus)
    if count < 2:
        pytest.skip("one CPU runs one thing at a time")
    threads, processes = Threads(count), Processes(count)
    try:
        side_by_side(
            row="T",
            what=f"{count} VMs in {count} threads",
            goal=1 / 0.95,
            ours=lambda: threads(ROUNDS),
            operations=count * ROUNDS * OPERATIONS,
            yardstick=lambda: processes(ROUNDS),
            units=count * ROUNDS * OPERATIONS,
            named=f"ours, {count} processes",
        )
    finally:
        processes.close()
