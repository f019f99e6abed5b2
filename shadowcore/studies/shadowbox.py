"""Counts and times of the log of shadowbox (2026), predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine.costs import Costs
from ..workload import WORKLOADS
from . import published as seen
from .predictions import SMALL, SWITCH, Column, Counted, Counts, Machine, Row, Validity, across, ept, shown

POOL = (1 << 30) // 4096 // 50
SEEDS = range(5)
_ROUNDS = {"page-fault": (1, 0), "parallel-fault": (6, 0), "fault-scaling": (4, 0), "unmap-scaling": (6, 0)}


def shadowbox_2026(step: Callable[[], None] = lambda: None) -> Validity:
    """Tables A (counts, in which no price has a part), B (times) and C (ideas that were rejected)."""
    machine = Machine(step)
    rows = _counts_2026(machine) + _times_2026(machine) + _markers(machine)
    return Validity("shadowbox-2026", tuple(rows))


def _first_touches(machine: Machine, name: str, vcpus: int = 1, mmu: str = "kvm-6.1", **how: Any) -> Counts:
    """Counters of a page, over all rounds, both parts of each; of threads that drift apart the mean of SEEDS."""
    rounds, _ = _ROUNDS[name]
    seeds = SEEDS if name == "parallel-fault" and vcpus > 1 else SEEDS[:1]
    parts = 2 if name in ("fault-scaling", "unmap-scaling") else 1
    pages = WORKLOADS[name].parameters["pages"].default * (1 if name == "page-fault" else vcpus)
    settings = {} if mmu in ("native", "nested") else {"pool_pages": POOL}
    how = {"vcpus": vcpus, "memory": "1GiB", **settings, **how}
    found = [machine.counts(name, mmu, pages / parts, rounds * parts, 0, seed=seed, **how) for seed in seeds]
    return {what: sum(counts[what] for counts in found) / len(found) for what in found[0]}


_KINDS = {"page faults that exit": "pf_taken", "passed on": "pf_guest", "fixed": "pf_fixed"}


def _counts_2026(machine: Machine) -> list[Row]:
    rows = []
    for (name, vcpus), measured in seen.COUNTS.items():
        found = _first_touches(machine, name, vcpus)
        for (what, counter), value in zip(_KINDS.items(), measured, strict=True):
            rows.append(Row("A", f"{name}, {vcpus} vCPU", what, "a page", value, found[counter], counts=shown(found)))
    return rows


def _columns_2026(machine: Machine) -> dict[str, Column]:
    pvm, nested = (Costs.preset(f"{name}-2026-13900hk") for name in ("pvm", "nested"))
    return {
        "kvm-ept": ept(machine, nested.replace(levels="ept-on-ept"), False),
        "kvm-spt": Column(machine, nested, "kvm-6.1", False),
        "pvm": Column(machine, pvm, "kvm-6.1", False),
    }


def _times_2026(machine: Machine) -> list[Row]:
    columns = _columns_2026(machine)
    rows = []
    why = {
        "fork-exec": {"pvm": SMALL},
        "syscall": {"pvm": SWITCH},
        "pipe round trip": {
            "pvm": "two processes that wait for each other: halts and wake-ups exit, and are not counted"
        },
        "unmap-scaling": {"pvm": "five exits for 4,096 pages: PVM was faster than EPT, for which no count speaks"},
    }

    def touches(name: str, **how: Any) -> Counted:
        return lambda column: _first_touches(machine, name, mmu=column.mmu, **how)

    def calls(name: str, unit: float, **how: Any) -> Counted:
        return lambda column: column.counts(name, unit, **how)

    cold = {"host": "4KiB", "backing": "cold"}
    tests: dict[str, Counted] = {
        "page-fault": touches("page-fault", backing="thp"),
        "parallel-fault": touches("parallel-fault", backing="thp"),
        "unmap-scaling": _half(machine, "unmap-scaling", backing="thp"),
        "fork-exec": calls("fork-exec", 1, warm=3),
        "syscall": calls("syscall", 1000),
        "pipe round trip": _served(calls("context-switch", 100)),
    }
    for test, counted in tests.items():
        rows += across(columns, "B", test, "ns", _ept_first(seen.TIMES[test]), counted, 1000, why.get(test))
    # What a page takes without huge pages starts from what it takes with them, for the guest does the same.
    ept = columns["kvm-ept"]
    own = seen.TIMES["page-fault"]["kvm-ept"] - 1000 * ept.microseconds(tests["page-fault"](ept))
    for test, counted in (
        ("page-fault, cold", touches("page-fault", **cold)),
        ("fault-scaling, cold", touches("fault-scaling", **cold)),
    ):
        for name, value in _ept_first(seen.TIMES[test]).items():
            counts = counted(columns[name])
            rows.append(
                Row("B", test, name, "ns", value, own + 1000 * columns[name].microseconds(counts), counts=shown(counts))
            )
    by = {(row.test, row.column): row for row in rows}
    for test in ("page-fault", "page-fault, cold"):
        one, other = by[test, "pvm"], by[test, "kvm-ept"]
        rows.append(
            Row("B", test, "pvm to kvm-ept", "ratio", one.published / other.published, one.predicted / other.predicted)
        )
    return rows


def _ept_first(published: dict[str, float]) -> dict[str, float]:
    return {"kvm-ept": published["kvm-ept"]} | published


def _half(machine: Machine, name: str, **how: Any) -> Counted:
    """The first part of each round alone."""
    pages = WORKLOADS[name].parameters["pages"].default

    def counted(column: Column) -> Counts:
        settings: dict[str, Any] = {} if column.mmu in ("native", "nested") else {"pool_pages": POOL}
        return machine.counts(name, column.mmu, pages, 6, 0, memory="1GiB", every=2, **settings, **how)

    return counted


def _served(counted: Counted) -> Counted:
    """PVM's switcher serves the CR3 loads of a few processes without an exit."""

    def served(column: Column) -> Counts:
        found = dict(counted(column))
        if column.costs.levels.control == "user":
            found["exits_cr3"] = 0
        return found

    return served


def _markers(machine: Machine) -> list[Row]:
    rows = []
    for (name, vcpus), (met, stale, hits, faults) in seen.MARKERS.items():
        at_walks = _first_touches(machine, name, vcpus, notpresent_marker="walk")
        in_sync = _first_touches(machine, name, vcpus, notpresent_marker="synced")
        test = f"{name}, {vcpus} vCPU"
        share = 100 * at_walks["markers_stale"] / at_walks["markers_made"]
        rows.append(Row("C", test, "marks of absent entries, stale when met", "%", 100 * stale / met, share))
        share = 100 * in_sync["marker_hits"] / in_sync["pf_guest"]
        rows.append(Row("C", test, "faults that marks in tables in sync save", "%", 100 * hits / faults, share))
    return rows
