"""Recorded programs run on the guest kernel: their system calls drive its calls, their accesses are demand paged."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DEFAULT_DESIGNS, Features, Native, Shadow, check_int, parse_size
from ..engine.machine import VM
from ..engine.reported import UNSYNC
from ..engine.windows import grown
from ..errors import ConfigError, EngineError, GuestOutOfMemory
from ..guest.kernel import NO_PROGRAM, Kernel
from ..guest.options import Call, File, KernelOptions
from ..recording.format import INCOMPLETE
from ..recording.reader import Reader
from ..workload import WorkloadResult
from .spaces import Accesses, Area, Follower, Key, Life, Piece, close_all, open_all, walk
from .survey import TURN, Fold, Survey, check_addresses, folding, survey

__all__ = ["ProgramResult", "Survey", "compare", "run", "survey", "table"]

BARE, SHARED, GROWS = 1, 1, 2
"""`flags` of Call.SPAWN and EXEC; of MMAP."""
_BIG = 1 << 16
"""Accesses made at once, at most."""


@dataclasses.dataclass(frozen=True)
class ProgramResult(WorkloadResult):
    """What a run of recorded programs came to: a WorkloadResult, from boot on, with

    accesses: of the recordings that were made (one of many bytes, or across pages of code, takes several operations).
    refused: of these, by a page fault that the guest kernel does not service: the program would have had a signal.
    ignored: accesses by processes that had ended.
    processes: a dict for each: recording, number, pid, command (None: unknown), accesses, refused, pages touched.
    recording_complete: False if one of the recordings ended before its time.
    windows: of counters of kernel ("kernel.NAME") and VM, by name; each row counts what happened in accesses
        [start, end). None where none were asked for.
    """

    accesses: int = 0
    refused: int = 0
    ignored: int = 0
    processes: tuple[dict[str, Any], ...] = ()
    recording_complete: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, the windows as lists."""
        plain = super().as_dict()
        if self.windows is not None:
            plain["windows"] = {name: column.tolist() for name, column in self.windows.items()}
        return plain


class _Runner(Follower):
    """Makes the kernel do what the programs did."""

    def __init__(self, kernel: Kernel, found: Survey, readers: Sequence[Reader], folded: Fold | None) -> None:
        super().__init__(readers)
        self.kernel = kernel
        self.found = found
        self.folded = folded
        self.refused = 0
        self.counts: dict[Key, list[int]] = {}
        self._files: dict[str, File] = {}
        self._slots: list[int] = []
        self._next = 0
        self.zeros: list[File] = []

    def at(self, addr: int) -> int:
        """Where an address of the recording is in the model."""
        return addr if self.folded is None else self.folded.one(addr)

    def _call(self, op: Call, life: Life, start: int = 0, end: int = 0, value: int = 0, **more: int) -> None:
        self.kernel.call(op, life.own, self.at(start), end - start, value, **more)

    def _slot(self) -> int:
        if self._slots:
            return self._slots.pop()
        self._next += 1
        return self._next - 1

    def _file(self, name: str, pages: int) -> File:
        if name not in self._files:
            self._files[name] = self.kernel.file(pages)
        return self._files[name]

    # -- processes

    def born(self, life: Life) -> None:
        life.own = self._slot()
        heap = self.at(self.found.heaps.get(life.image, 0))
        self.kernel.call(Call.SPAWN, life.own, heap, value=NO_PROGRAM, flags=BARE)
        self._load(life)

    def executed(self, life: Life, file: str | None) -> None:
        heap = self.at(self.found.heaps.get(life.image, 0))
        self.kernel.call(Call.EXEC, life.own, heap, value=NO_PROGRAM, flags=BARE)
        self._load(life)
        self._discard()

    def _load(self, life: Life) -> None:
        """Map the image and the stack of a program, as exec does."""
        group = self.found.groups[life.image]
        for region in self.found.regions[life.image]:
            start, end = region.first << 12, region.stop << 12
            area = Area(region.prot, base=start)
            if region.page is not None:
                backing = self._file("image of " + group, self.found.image_files[group])
                area = Area(region.prot, False, group, start, region.page, backing)
            self._map(life, start, end, area, region.grows)
            life.space.add(start, end, area)

    def cloned(self, parent: Life, child: Life) -> None:
        child.own = self._slot()
        self.kernel.call(Call.FORK, parent.own, value=child.own)

    def exited(self, life: Life) -> None:
        self.kernel.call(Call.EXIT, life.own)
        self._slots.append(life.own)
        self._discard()

    # -- memory

    def _map(self, life: Life, start: int, end: int, area: Area, grows: bool = False) -> None:
        value = 0 if area.backing is None else area.backing.number + 1 | area.page_at(start) << 32
        flags = (SHARED if area.shared else 0) | (GROWS if grows else 0)
        self._call(Call.MMAP, life, start, end, value, flags=flags, prot=area.prot)

    def mapped(self, life: Life, start: int, end: int, area: Area) -> Area:
        if area.file is not None:
            area = dataclasses.replace(area, backing=self._file(area.file, self.found.files[area.file]))
        elif area.shared and area.backing is None:
            area = dataclasses.replace(area, backing=self.kernel.file(end - start >> 12, zero=True))
            self.zeros.append(area.backing)
        self._map(life, start, end, area)
        return area

    def _each(self, op: Call, life: Life, pieces: list[Piece], **more: int) -> None:
        """A call for each range of pieces that has no hole, for some kernels refuse them."""
        start, end = pieces[0][:2]
        for first, last, _ in pieces[1:]:
            if first != end:
                self._call(op, life, start, end, **more)
                start = first
            end = last
        self._call(op, life, start, end, **more)

    def unmapped(self, life: Life, pieces: list[Piece]) -> None:
        if self.folded is None:
            self._call(Call.MUNMAP, life, pieces[0][0], pieces[-1][1])
        else:
            self._each(Call.MUNMAP, life, pieces)
        if any(area.backing is not None and area.shared for _, _, area in pieces):
            self._discard()

    def protected(self, life: Life, pieces: list[Piece], prot: int) -> None:
        self._each(Call.MPROTECT, life, pieces, prot=prot)

    def heap_moved(self, life: Life, old: int, new: int) -> None:
        self.kernel.call(Call.BRK, life.own, self.at(new))

    def moved(self, life: Life, start: int, end: int, to: int) -> None:
        self.kernel.call(Call.MOVE, life.own, self.at(to), end - start, self.at(start))

    def dropped(self, life: Life, pieces: list[Piece]) -> None:
        self._each(Call.DROP, life, pieces)

    def _discard(self) -> None:
        """Shared anonymous memory that nobody maps any more goes."""
        if self.zeros:
            used = {area.backing for life in self.lives.values() for _, _, area in life.space.pieces}
            for file in [file for file in self.zeros if file not in used]:
                self.kernel.discard(file)
                self.zeros.remove(file)

    def accessed(self, life: Life, accesses: Accesses) -> None:
        op, size, addr = accesses
        count = self.counts.setdefault(life.key, [0, 0])
        refused = self.kernel.replay(life.own, op, size, addr if self.folded is None else self.folded.all(addr))
        count[0] += len(op)
        count[1] += refused
        self.refused += refused

    def finish(self) -> None:
        """End the processes that are left; the page cache is emptied."""
        for life in list(self.lives.values()):
            self.end(life)
        for file in self._files.values():
            self.kernel.discard(file)


def _options(found: Survey, options: KernelOptions, seed: int) -> KernelOptions:
    """Settings of the kernel, with room for the programs in its tables."""
    files = len(found.files) + len(found.image_files) + found.shared[0]
    pages = sum(found.files.values()) + sum(found.image_files.values()) + found.shared[1]
    room = {
        "max_processes": found.processes + 2,
        "max_mappings": 2 * found.mappings + 64,
        "max_files": files + 1,
        "max_file_pages": pages + 1,
    }
    return dataclasses.replace(
        options, seed=seed, **{name: max(needed, getattr(options, name)) for name, needed in room.items()}
    )


def _machine(vm: VM | str | Native | Shadow, memory: str | int | None, found: Survey, options: KernelOptions) -> VM:
    if isinstance(vm, VM):
        return vm
    size = found.memory if memory is None else parse_size(memory)
    if memory is None and options.mode in ("32", "pae"):
        size = min(size, 896 << 20)
    return VM(size, vm, features=Features())


class _Windows:
    """Rows of what the counters counted."""

    def __init__(self, every: int, kernel: Kernel, vm: VM) -> None:
        self.every = every
        self._sources = kernel, vm
        self._rows: list[tuple[int, ...]] = []
        self._start, self._last = 0, self._now()

    def _now(self) -> dict[str, int]:
        kernel, vm = self._sources
        return {f"kernel.{name}": value for name, value in kernel.counters.items()} | vm.stats.as_dict()

    def close(self, end: int) -> None:
        if end > self._start:
            now = self._now()
            self._rows.append((self._start, end, *(now[name] - self._last[name] for name in now)))
            self._start, self._last = end, now

    def columns(self) -> dict[str, NDArray[np.uint64]]:
        table = np.array(self._rows, dtype=np.uint64).reshape(len(self._rows), 2 + len(self._last))
        return dict(zip(("start", "end", *self._last), table.T, strict=True))


def _cut(part: Any, done: int, end: int, window: int) -> Iterator[Any]:
    """A part of a walk before which `done` accesses were made: accesses in pieces of _BIG at most, that stop at `end`
    and at the ends of windows."""
    if not isinstance(part, tuple):
        yield part
        return
    process, *columns = part
    at, n = 0, min(len(columns[0]), end - done)
    while at < n:
        room = min(_BIG, n - at, window - (done + at) % window if window else _BIG)
        yield (process, *(column[at : at + room] for column in columns))
        at += room


def run(
    recordings: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Survey,
    vm: VM | str | Native | Shadow = "cached",
    *,
    memory: str | int | None = None,
    seed: int = 0,
    operations: int | None = None,
    options: KernelOptions | None = None,
    turn: int = TURN,
    fold: bool = False,
    windows: int = 0,
    record: bool = False,
    audit_every: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ProgramResult:
    """Run recordings of programs on the guest kernel, from boot until they have ended and all of their memory is free.

    recordings: a file or several, or what `survey` found in them, which saves that pass (`turn` is then the survey's).
    vm: a fresh VM, or a design, for which a VM of `memory` bytes is made (None: enough for what the survey found).
    seed: of the kernel. options: of the kernel; room in its tables for the programs is added.
    operations: accesses of the recordings to make, from their beginning (None: all).
    turn: accesses that one process makes before the next, where the recordings do not say who ran when.
    fold: addresses that the user half of the mode does not have are packed below its end; otherwise
        TraceError. windows: rows of counters, one for this many accesses (0: none).
    record: keep every operation (19 bytes each). audit_every: check all invariants (AuditError) after this many
        accesses, and at the end (0: never). progress: called with accesses done, and all.

    GuestOutOfMemory says what the programs touch. ConfigError and TraceError as in `workload.run` and `Reader`.
    """
    every = check_int("audit_every", audit_every, 0, 1 << 62)
    window = check_int("windows", windows, 0, 1 << 62)
    check_int("seed", seed, 0, (1 << 64) - 1)
    wanted = None if operations is None else check_int("operations", operations, 0, 1 << 62)
    if options is not None and not isinstance(options, KernelOptions):
        raise ConfigError(f"options: KernelOptions are needed, not {options!r:.60}")
    found = recordings if isinstance(recordings, Survey) else survey(recordings, turn=turn)
    settings = _options(found, options or KernelOptions(), seed)
    machine = _machine(vm, memory, found, settings)
    kernel = Kernel(machine, settings)
    folded = None
    if fold:
        folded = folding(found, kernel.task_size)
    else:
        check_addresses(found, kernel.task_size, settings.mode)
    if record:
        kernel.record()
    before = machine.stats.as_dict()
    total = found.records if wanted is None else min(wanted, found.records)
    readers = open_all(found.paths)
    runner = _Runner(kernel, found, readers, folded)
    rows = _Windows(window, kernel, machine) if window else None
    seconds = 0.0
    try:
        clock = time.perf_counter()
        for number, part in walk(readers, found.turn):
            if wanted is not None and runner.accesses >= wanted:
                break
            for piece in _cut(part, runner.accesses, total, window):
                done = runner.accesses
                runner.take(number, piece)
                if rows is not None and runner.accesses // window != done // window:
                    rows.close(runner.accesses)
                if every and runner.accesses // every != done // every:
                    seconds += time.perf_counter() - clock
                    machine.audit(strict=True)
                    clock = time.perf_counter()
                if progress is not None and runner.accesses != done:
                    progress(runner.accesses, total)
        runner.finish()
        seconds += time.perf_counter() - clock
    except GuestOutOfMemory as error:
        raise GuestOutOfMemory(_shortage(error, found, machine)) from None
    finally:
        close_all(readers)
    if every:
        machine.audit(strict=True)
    if rows is not None:
        rows.close(runner.accesses)
    return _result(runner, machine, settings, before, seconds, record, rows)


def compare(
    recordings: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Survey,
    designs: Sequence[str | Native | Shadow] = DEFAULT_DESIGNS,
    *,
    turn: int = TURN,
    **settings: Any,
) -> list[ProgramResult]:
    """The same recordings under each design; settings as those of `run`. EngineError if the guests did not do the same,
    access by access, which no design may change."""
    found = recordings if isinstance(recordings, Survey) else survey(recordings, turn=turn)
    results = [run(found, design, **settings) for design in designs]
    if len({result.history for result in results}) > 1:
        raise EngineError(f"{found.name}: the guest did not do the same under {', '.join(r.design for r in results)}")
    return results


_ROWS = (
    ("VM exits", "exits_total"),
    ("  page fault: shadow entry missing", "exits_fill"),
    ("  page fault: more rights for a leaf", "exits_write"),
    ("  page fault: store to a guest table", "exits_emulate"),
    ("  page fault: the guest's own", "exits_guest"),
    ("  CR3 load", "exits_cr3"),
    ("  INVLPG", "exits_invlpg"),
    ("shadow pages zapped", "mmu_shadow_zapped"),
    *((name, key) for key, name in UNSYNC.items()),
    ("entries read by the processor's walks", "walk_references"),
)


def table(results: Sequence[ProgramResult]) -> str:
    """A comparison as text: what the guest did, and below it, design by design, what it cost."""
    first = results[0]
    did = first.counters
    lines = [
        f"{first.workload}: {first.accesses:,} accesses of {len(first.processes)} processes, "
        f"{did['faults']:,} page faults, {did['forks']:,} forks, {did['execs']:,} execs",
        "".join([f"{'':40}", *(f"{result.design:>14}" for result in results)]),
    ]
    for name, key in _ROWS:
        if key in UNSYNC and not any(result.stats[key] for result in results):
            continue
        lines.append("".join([f"{name:40}", *(f"{result.stats[key]:14,}" for result in results)]))
    per_million = (1e6 * result.stats["exits_total"] / max(result.accesses, 1) for result in results)
    lines.append("".join([f"{'VM exits per million accesses':40}", *(f"{value:14,.1f}" for value in per_million)]))
    if not first.recording_complete:
        lines.append(f"{INCOMPLETE}.")
    return "\n".join(lines)


def _shortage(error: GuestOutOfMemory, found: Survey, vm: VM) -> str:
    touched, has = found.peak * 4096 / (1 << 20), len(vm.memory.bytes) / (1 << 20)
    return (
        f"{error}; {found.name} touches {touched:.1f} MiB at a time at most, beside page tables and the page cache; "
        f"the guest has {has:g} MiB, {found.memory >> 20} MiB are enough"
    )


def _result(
    runner: _Runner,
    vm: VM,
    settings: KernelOptions,
    before: dict[str, int],
    seconds: float,
    record: bool,
    rows: _Windows | None,
) -> ProgramResult:
    kernel, found = runner.kernel, runner.found
    counters, stats = kernel.counters, vm.stats.as_dict()
    return ProgramResult(
        workload=found.name,
        design=vm.mmu.design.name,
        seed=settings.seed,
        parameters={"turn": found.turn},
        operations=sum(counters[name] for name in ("accesses", "kernel_accesses", "cr3_loads", "invlpg")),
        setup=0,
        counters=counters,
        stats=grown(stats, before),
        frames=kernel.frames,
        history=kernel.history,
        seconds=seconds,
        recording=kernel.recording if record else None,
        accesses=runner.accesses - runner.ignored,
        refused=runner.refused,
        ignored=runner.ignored,
        processes=tuple(_process(runner, key) for key in sorted(runner.counts)),
        recording_complete=all(reader.complete for reader in runner.readers),
        windows=None if rows is None else rows.columns(),
    )


def _process(runner: _Runner, key: Key) -> dict[str, Any]:
    entries = [entry for entry in runner.readers[key[0]].processes if entry.get("number") == key[1]]
    known = entries[0] if entries else {}
    accesses, refused = runner.counts[key]
    return {
        "recording": runner.found.paths[key[0]],
        "number": key[1],
        "pid": known.get("pid"),
        "command": known.get("command"),
        "accesses": accesses,
        "refused": refused,
        "pages": runner.found.touched.get(key, 0),
    }
