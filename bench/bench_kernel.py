"""Workloads on the guest kernel: operations of the processor, the kernel's own work included."""

import pytest

import shadowcore as sc

DESIGNS = ("native", "cached")
OPERATIONS = 1_000_000
GOAL_NS = 200
"""Five million operations a second."""
WORKLOADS = (
    "pingpong",
    "hackbench",
    "webserver",
    "database",
    "analytics",
    "demand",
    "ageing",
    "shell",
    "compile",
    "kbuild-like",
    "fork-storm",
)


@pytest.mark.benchmark(group="kernel")
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(benchmark, name, design):
    """Seconds of the work alone, without the setup, as the workload measures them."""
    results = []

    def once():
        results.append(sc.workload.run(name, design, operations=OPERATIONS))

    benchmark.pedantic(once, rounds=3, iterations=1)
    best = max(results, key=lambda result: result.operations_per_second)
    benchmark.extra_info.update(
        what=f"{name}, {design}", operations_per_second=best.operations_per_second, goal_ns=GOAL_NS
    )
    benchmark.extra_info["ns"] = 1e9 / best.operations_per_second
    assert len({result.history for result in results}) == 1


@pytest.mark.benchmark(group="kernel")
@pytest.mark.parametrize("design", DESIGNS)
def test_own_work_of_an_access(side_by_side, yardsticks, design):
    """An access of a process that hits, against the same operations by VCpu.run: the rest is the kernel's own."""
    kernel = sc.Kernel(sc.VM("64MiB", mmu=design))
    process = kernel.spawn()
    base = process.mmap(1024 * 4096)
    process.sweep(base, 1024, write=True)
    count = 200_000
    kernel.record()
    process.scatter(base, 1024 * 4096, count)
    ops = kernel.recording
    kernel.record(False)

    def bare():
        return kernel.vm.vcpus[0].run(ops)

    def check(refused):
        assert refused == 0

    side_by_side(
        row=11,
        what=f"an access of a process, {design}",
        goal=None,
        ours=lambda: process.scatter(base, 1024 * 4096, count),
        operations=count,
        yardstick=bare,
        units=len(ops),
        named="VCpu.run",
        check=check,
        counters=lambda _: kernel.counters,
    )
