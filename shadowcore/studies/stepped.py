"""What can be stepped through by name: scenarios, workloads, recordings of guests and of operations. Each is carried
out under a design from a point on, an operation at a time."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..config import TLB, Design, Shadow, check_int, design
from ..engine.machine import VM
from ..engine.tlbs import ProcessorTLB
from ..errors import ConfigError, TraceError
from ..guest.kernel import Kernel
from ..guest.options import KernelOptions
from ..recording import kinds, replay
from ..recording.guest import BUNDLED, open_recording
from ..recording.reader import Reader
from ..recording.records import replay as replay_records
from ..workload.script import WORKLOADS, Guest, Workload
from .scenarios import SCENARIOS, Scenario
from .scenarios import Guest as ScenarioGuest
from .source import GuestSource, OperationsSource, find
from .steps import Action, Steps, capture, operations

__all__ = ["designs_of", "show"]

DESIGNS = ("cached", "unsync")
"""Under which a workload or a recording is shown, where nobody says."""
SMALL_TLB = TLB(small_entries=16, small_ways=4, large_entries=4, large_ways=4, huge_entries=0, huge_ways=1)
"""Of the scenarios: it fits on a page."""


def designs_of(source: str) -> tuple[str, ...]:
    """Names of the designs under which `source` is shown where nobody says."""
    return SCENARIOS[source].designs if source in SCENARIOS else DESIGNS


def show(
    source: str | os.PathLike[str],
    mmu: str | Design,
    *,
    start: int | None = None,
    limit: int = 300,
    exits_only: bool = False,
    pool: int | None = None,
    seed: int = 0,
    tlb: TLB | ProcessorTLB | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Steps:
    """Step through a scenario, a workload (by name) or a recording (a file) under one design.

    start: operation or record at which to begin (None: a scenario's first; a workload's first after its setup; a
    recording's first of user code). limit: steps at most, 1 to 5,000. exits_only: only operations that exit.
    pool: shadow pages. seed: of a workload. tlb: to model (None: a scenario has SMALL_TLB, others have none).
    progress: called with steps done and their limit. ConfigError for what there is not, with the nearest name.
    """
    check_int("limit", limit, 1, 5_000)
    made = design(mmu)
    if pool is not None:
        if not isinstance(made, Shadow):
            raise ConfigError(f"pool: it is no setting of {made.name}; a design that has it is needed")
        made = dataclasses.replace(made, pool_pages=pool)
    name = os.fspath(source)
    told = None if progress is None else (lambda done: progress(done, limit))
    options: dict[str, Any] = {"limit": limit, "exits_only": exits_only, "progress": told}
    if name in SCENARIOS:
        if start:
            raise ConfigError("start: a scenario is shown from its first operation on")
        return _scenario(SCENARIOS[name], made, pool, tlb, options)
    if tlb is not None and name not in WORKLOADS:
        raise ConfigError("tlb: a recording has the accesses that missed one; a scenario or a workload is needed")
    if name in WORKLOADS:
        return _workload(WORKLOADS[name], made, start, seed, tlb, options)
    if name == BUNDLED:
        return _guest(open_recording(None), made, start, options)
    if not os.path.exists(name):
        known = (*SCENARIOS, *WORKLOADS, BUNDLED)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "see `shadowcore show` for scenarios"
        raise ConfigError(f"{name}: there is no such scenario, workload or file; {hint}")
    return _recording(name, made, start, options)


def _scenario(
    scenario: Scenario, made: Design, pool: int | None, tlb: TLB | ProcessorTLB | None, options: dict[str, Any]
) -> Steps:
    if isinstance(made, Shadow):
        kept: dict[str, Any] = {k: v for k, v in scenario.settings.items() if k != "pool_pages" or pool is None}
        made = dataclasses.replace(made, **kept)
    vm = VM(scenario.memory, made, tlb=tlb or SMALL_TLB)
    guest = ScenarioGuest(vm)
    scenario.setup(guest)
    guest.tables.activate(vm.vcpus[0])
    if isinstance(made, Shadow):
        vm.mmu.zap_all()  # what the processor had before paging was on
    vm.stats.reset()
    return capture(vm, operations(vm, guest.operations, guest.notes), **options)


def _workload(
    workload: Workload,
    made: Design,
    start: int | None,
    seed: int,
    tlb: TLB | ProcessorTLB | None,
    options: dict[str, Any],
) -> Steps:
    """The workload's operations are those of a run under native: the guest does the same under every design."""
    boot = KernelOptions(seed=seed, **workload.options)
    kernel = Kernel(VM(workload.memory, "native"), boot)
    vm = VM(workload.memory, made, tlb=tlb)
    Kernel(vm, boot)
    kernel.record()
    rounds = workload.function(Guest(kernel, np.random.default_rng(seed)), **workload.checked({}))
    next(rounds)
    begin = len(kernel.recording) if start is None else check_int("start", start, 0, 10_000_000)
    while len(kernel.recording) < begin + 100 * options["limit"]:
        before = len(kernel.recording)
        next(rounds)
        if len(kernel.recording) == before:
            break
    ops = kernel.recording
    vm.stats.reset()
    vm.vcpus[0].run(ops[:begin])
    return capture(vm, operations(vm, ops[begin:]), first=begin, **options)


def _recording(path: str, made: Design, start: int | None, options: dict[str, Any]) -> Steps:
    found = find(path)
    if isinstance(found, OperationsSource):
        with Reader(path) as reader:
            return _operations(reader, made, start or 0, options)
    if isinstance(found, GuestSource):
        return _guest(found.recording, made, start, options)
    raise TraceError(path, None, f"a recording of a guest or of operations expected, not of {found.stream}")


def _guest(recording: Any, made: Design, start: int | None, options: dict[str, Any]) -> Steps:
    if start is None:
        start = recording.first_user or recording.first_cr3
    check_int("start", start, recording.first_cr3, recording.operations - 1)
    vm = replay.machine_at(recording, made, start)
    return capture(vm, _records(recording, vm, start), first=start, **options)


def _operations(reader: Reader, made: Design, start: int, options: dict[str, Any]) -> Steps:
    check_int("start", start, 0, reader.records - 1)
    vm = replay.machine(reader, made)

    def actions() -> Iterator[Action]:
        left = start
        for ops in reader.operations():
            vm.vcpus[0].run(ops[:left])
            yield from operations(vm, ops[left:])
            left = max(left - len(ops), 0)

    return capture(vm, actions(), first=start, **options)


_SIZES = {0: "INVPCID of one address", 1: "INVPCID of one PCID", 2: "INVPCID of all", 3: "INVPCID of all but global"}


def _records(recording: Any, vm: VM, start: int) -> Iterator[Action]:
    """An Action for each record of a guest from `start` on."""
    for base, piece in recording.pieces(start):
        flags = replay.piece_flags(piece, recording.first_user, base)
        arrays = piece.arrays | {"flags": flags}
        for i in range(max(start - base, 0), piece.operations):
            kind, flag, addr = int(piece.kind[i]), int(flags[i]), int(piece.addr[i])
            value, vcpu = int(piece.value[i]), int(piece.vcpu[i])
            title, gva = _record_title(kind, flag, addr, value)
            run = _runner(vm, arrays, i, recording.direct_map)
            yield Action(title, run, gva, vcpu, quiet=not title)


def _record_title(kind: int, flags: int, addr: int, value: int) -> tuple[str, int | None]:
    """A record in words ("": no step of its own), and the gva that it is about."""
    who = "user code" if flags & kinds.USER else "the kernel"
    if kind == kinds.ACCESS:
        verb = "writes" if flags & kinds.WRITE else "fetches from" if flags & kinds.FETCH else "reads"
        return f"{who} {verb} {addr:#x}", addr
    if kind == kinds.STORE:
        return "" if flags & kinds.SNAPSHOT else f"the kernel stores {value:#x} to a table, at gpa {addr:#x}", None
    titles = {
        kinds.TABLE: f"the frame at gpa {addr:#x} begins to serve as a table",
        kinds.TABLE_END: f"the frame at gpa {addr:#x} is no table any longer",
        kinds.LOAD_CR3: f"the kernel loads CR3 with {addr:#x}",
        kinds.LOAD_CR: f"the kernel loads CR0 with {addr:#x} and CR4 with {value:#x}",
        kinds.LOAD_EFER: f"the kernel loads EFER with {addr:#x}",
        kinds.INVLPG: f"the kernel executes INVLPG {addr:#x}",
        kinds.INVPCID: f"the kernel executes {_SIZES[flags & 3]}",
    }
    return titles.get(kind, ""), addr if kind == kinds.INVLPG else None


def _runner(vm: VM, arrays: dict[str, Any], i: int, direct_map: int) -> Callable[[], str]:
    def run() -> str:
        done = replay_records(vm, arrays, i, i + 1, direct_map)
        return "a fault" if done["faults"] else ""

    return run
