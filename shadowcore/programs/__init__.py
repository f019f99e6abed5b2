"""Recorded programs run on the guest kernel: their system calls drive its calls, their accesses are demand paged."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..config import DEFAULT_DESIGNS, TLB, Design, Features, check_int, parse_size
from ..engine.audits import Audits
from ..engine.machine import VM
from ..engine.tlbs import ProcessorTLB
from ..engine.windows import WindowLog, grown
from ..errors import ConfigError, EngineError, GuestOutOfMemory
from ..guest.kernel import NO_PROGRAM, Kernel
from ..guest.options import Call, File, KernelOptions
from ..recording.reader import Reader
from ..workload import WorkloadResult
from .spaces import Accesses, Area, Follower, Key, Life, Piece, close_all, open_all, walk
from .survey import TURN, Fold, Survey, check_addresses, folding, survey

__all__ = ["ProgramResult", "Survey", "compare", "run", "survey"]

BARE, SHARED, GROWS = 1, 1, 2
"""`flags` of Call.SPAWN and EXEC; of MMAP."""
_BIG = 1 << 16
"""Accesses made at once, at most."""
_PART = 256
"""And at least, where no window ends: a look at counters costs as much."""


@dataclasses.dataclass(frozen=True)
class ProgramResult(WorkloadResult):
    """What a run of recorded programs came to: a WorkloadResult, from boot on, with

    accesses: of the recordings that were made, and are counted (one of many bytes, or across pages of code, takes
        several operations). warm_up: those made before them.
    refused: of these, by a page fault that the guest kernel does not service: the program would have had a signal.
    ignored: accesses by processes that had ended.
    processes: a dict for each: recording, number, pid, command (None: unknown), accesses, refused, pages touched.
    recording_complete: False if one of the recordings ended before its time.
    windows: see `windows.WindowLog`, with counters of the kernel as "kernel.NAME"; each element counts what happened in
        accesses [start, end), of those that are counted. None where none were asked for.
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
        self.before = 0  # accesses that are not counted, but for those ignored

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

    def count_from_here(self) -> None:
        """What was made so far warmed the guest, and is not counted."""
        self.before = self.accesses - self.ignored
        self.refused = 0
        self.counts.clear()

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


def _machine(
    vm: VM | str | Design,
    memory: str | int | None,
    found: Survey,
    options: KernelOptions,
    tlb: TLB | ProcessorTLB | None,
) -> VM:
    if isinstance(vm, VM):
        return vm
    size = found.memory if memory is None else parse_size(memory)
    if memory is None and options.mode in ("32", "pae"):
        size = min(size, 896 << 20)
    return VM(size, vm, tlb=tlb, features=Features())


class _Meter:
    """Counters from the end of the warm-up on, in windows of accesses where they are asked for."""

    def __init__(self, kernel: Kernel, vm: VM, window: int, warm_up: int) -> None:
        self._kernel, self._vm, self.window, self.warm_up = kernel, vm, window, warm_up
        self.begun = 0  # accesses made before the first that is counted
        self.begin(0)

    def begin(self, done: int) -> None:
        """What is counted begins, after so many accesses."""
        self.begun, self.clock = done, time.perf_counter()
        self.stats = self._vm.stats.as_dict()
        self.counters = self._kernel.counters if done else dict.fromkeys(self._kernel.counters, 0)  # with those of boot
        self._last = self.counters
        self._log = WindowLog(self._vm.stats)

    def room(self, done: int) -> int:
        """Accesses that may be made at once: until the warm-up or a window ends, or an eighth of a long window."""
        if done < self.warm_up:
            return self.warm_up - done
        if not self.window:
            return _BIG
        left = self.window - (done - self.warm_up) % self.window
        return min(left, max(_PART, self.window // 8))

    def look(self, done: int, last: bool = False) -> None:
        """So many accesses are made. last: and there are no more."""
        if self.begun < self.warm_up <= done:
            self.begin(done)
            return
        if not self.window or done < self.warm_up:
            return
        pages = self._vm.stats.mmu_cache_miss - self._vm.stats.page_frees
        self._log.pages(1, pages, pages)
        if last or (done - self.warm_up) % self.window == 0:
            counters = self._kernel.counters
            new = {name: counters[name] - self._last[name] for name in counters}
            self._last = counters
            known = {name: new[name] for name in ("faults", "table_stores", "switches")}
            known |= {"guest_cr3_loads": new["cr3_loads"], "operations": _operations(new)}
            self._log.count(**known, **{f"kernel.{name}": value for name, value in new.items()})
            self._log.close(done - self.warm_up)

    def results(self, done: int) -> dict[str, Any]:
        """What a ProgramResult has of it."""
        if not self.window:
            return {}
        found = self._log.arrays(done - self.begun)
        ends = found["operation"]
        most = int(found["pages_max"].max(initial=0))
        found |= {"start": np.append(np.uint64(0), ends[:-1]), "end": ends}
        return {"windows": found, "pages_mean": self._log.pages_mean, "pages_max": most}


def _operations(counters: dict[str, int]) -> int:
    return sum(counters[name] for name in ("accesses", "kernel_accesses", "cr3_loads", "invlpg"))


def _cut(part: Any, done: int, end: int, room: Callable[[int], int]) -> Iterator[Any]:
    """A part of a walk before which `done` accesses were made: accesses in pieces of _BIG at most, no larger than there
    is room, that stop at `end`."""
    if not isinstance(part, tuple):
        yield part
        return
    process, *columns = part
    at, n = 0, min(len(columns[0]), end - done)
    while at < n:
        size = min(_BIG, n - at, room(done + at))
        yield (process, *(column[at : at + size] for column in columns))
        at += size


def run(
    recordings: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Survey,
    vm: VM | str | Design = "cached",
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
    tlb: TLB | ProcessorTLB | None = None,
    warm_up: int = 0,
    audit_at: Iterable[str] = (),
    log_exits: bool = False,
) -> ProgramResult:
    """Run recordings of programs on the guest kernel, from boot until they have ended and all of their memory is free.

    recordings: a file or several, or what `survey` found in them, which saves that pass (`turn` is then the survey's).
    vm: a fresh VM, or a design, for which a VM of `memory` bytes is made (None: enough for what the survey found).
    seed: of the kernel. options: of the kernel; room in its tables for the programs is added.
    operations: accesses of the recordings to make, from their beginning (None: all).
    turn: accesses that one process makes before the next, where the recordings do not say who ran when.
    fold: addresses that the user half of the mode does not have are packed below its end; otherwise
        TraceError. windows: count by windows of this many accesses (0: do not). tlb: to model, where the VM is made
        here.
    warm_up: of the accesses, those that come first and are not counted. log_exits: keep a log of all exits that are
        counted. Its operations are the processor's, from boot on.
    record: keep every operation (19 bytes each). audit_every: check all invariants (AuditError) after this many
        accesses, and at the end (0: never). audit_at: and at these points of VM.audit_points. progress: called with
        accesses done, and all.

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
    total = found.records if wanted is None else min(wanted, found.records)
    warm = check_int("warm_up", warm_up, 0, max(total - 1, 0))
    if isinstance(vm, VM) and tlb is not None:
        raise ConfigError("tlb: the VM that was given has its own, or none")
    machine = _machine(vm, memory, found, settings, tlb)
    if audit_at:
        machine.audit_points = audit_at
    kernel = Kernel(machine, settings)
    folded = None
    if fold:
        folded = folding(found, kernel.task_size)
    else:
        check_addresses(found, kernel.task_size, settings.mode)
    if record:
        kernel.record()
    readers = open_all(found.paths)
    runner = _Runner(kernel, found, readers, folded)
    exits = machine.record_exits() if log_exits else None
    meter = _Meter(kernel, machine, window, warm)
    audits = Audits(machine, every)
    seconds = 0.0
    try:
        with audits.told(lambda: runner.accesses):
            clock = meter.clock
            for number, part in walk(readers, found.turn):
                if wanted is not None and runner.accesses >= wanted:
                    break
                for piece in _cut(part, runner.accesses, total, meter.room):
                    done = runner.accesses
                    runner.take(number, piece)
                    if runner.accesses == done:
                        continue
                    if runner.accesses < total:
                        meter.look(runner.accesses)
                    if clock < meter.clock:
                        seconds, clock = 0.0, meter.clock
                        runner.count_from_here()
                        if exits is not None:
                            exits.clear()
                    if audits.due(runner.accesses):
                        seconds += time.perf_counter() - clock
                        audits.look(runner.accesses)
                        clock = time.perf_counter()
                    if progress is not None:
                        progress(runner.accesses, total)
            runner.finish()
            meter.look(runner.accesses, last=True)
            seconds += time.perf_counter() - clock
            audits.look(runner.accesses)
    except GuestOutOfMemory as error:
        raise GuestOutOfMemory(_shortage(error, found, machine)) from None
    finally:
        close_all(readers)
    made = _result(runner, machine, settings, meter, seconds, record, audits.made)
    return made if exits is None else dataclasses.replace(made, exit_log=exits.close())


def compare(
    recordings: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Survey,
    designs: Sequence[str | Design] = DEFAULT_DESIGNS,
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
    meter: _Meter,
    seconds: float,
    record: bool,
    audits: int,
) -> ProgramResult:
    kernel, found = runner.kernel, runner.found
    counters = {name: value - meter.counters[name] for name, value in kernel.counters.items()}
    return ProgramResult(
        workload=found.name,
        design=vm.mmu.design.name,
        seed=settings.seed,
        parameters={"turn": found.turn},
        operations=_operations(counters),
        setup=0,
        counters=counters,
        stats=grown(vm.stats.as_dict(), meter.stats),
        frames=kernel.frames,
        history=kernel.history,
        seconds=seconds,
        recording=kernel.recording if record else None,
        accesses=runner.accesses - runner.ignored - runner.before,
        refused=runner.refused,
        ignored=runner.ignored,
        processes=tuple(_process(runner, key) for key in sorted(runner.counts)),
        recording_complete=all(reader.complete for reader in runner.readers),
        warm_up=meter.begun,
        audits=audits,
        **meter.results(runner.accesses),
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
