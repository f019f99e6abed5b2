"""Replays: a recorded guest run again on a virtual machine of some design, and what that costs. The machine that a
recording of operations starts on.

A table store goes through the guest's own mappings, so that write protection is met as in life, and every
access is checked against the recorded gpa: a replay checks itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import notebook
from ..config import TLB, Design, Features, Shadow, check_int, design
from ..engine.future import Future, recorder_of
from ..engine.machine import VM, set_registers
from ..engine.reported import unsync_counts
from ..engine.tlbs import ProcessorTLB
from ..engine.windows import WindowLog, grown
from ..errors import AuditError, ConfigError, GeneralProtection, TraceError
from .guest import BUNDLED, Recording, RecordingFile, load, open_recording
from .kinds import (
    ACCESS,
    CPL_KNOWN,
    FETCH,
    INVLPG,
    INVPCID,
    LOAD_CR,
    LOAD_CR3,
    LOAD_EFER,
    MARK,
    SNAPSHOT,
    STORE,
    TABLE,
    TABLE_END,
    USER,
    WRITE,
)
from .reader import Reader
from .records import replay as replay_records

__all__ = [
    "ACCESS",
    "BUNDLED",
    "CPL_KNOWN",
    "FETCH",
    "INVLPG",
    "INVPCID",
    "LOAD_CR",
    "LOAD_CR3",
    "LOAD_EFER",
    "MARK",
    "SNAPSHOT",
    "STORE",
    "TABLE",
    "TABLE_END",
    "USER",
    "WRITE",
    "Phase",
    "Recording",
    "RecordingFile",
    "ReplayResult",
    "load",
    "machine",
    "machine_at",
    "open_recording",
    "replay",
]

SLICE = 1 << 16
"""Records per call of the engine: progress and Ctrl-C are served in between, many times a second."""

RESET_CR0 = 0x60000010
"""CR0 after a reset, by which processors other than the first begin."""
_MISMATCHES = 10
"""Mismatching records that a result names."""
_COUNTS = ("accesses", "table_stores", "snapshot_words", "physical_stores", "faults", "gpa_mismatches")
"""What the engine counts in a slice, and a result over all of them."""


class Phase(NamedTuple):
    """A stretch of a replay: records, guest instructions, and what the counters of vm.stats grew by."""

    records: int
    instructions: int
    counters: dict[str, int]

    @property
    def exits(self) -> dict[str, int]:
        """VM exits by reason."""
        by_name = {k.removeprefix("exits_"): n for k, n in self.counters.items() if k.startswith("exits_")}
        del by_name["total"]
        return by_name

    @property
    def exits_total(self) -> int:
        """VM exits, whatever the reason."""
        return self.counters["exits_total"]

    @property
    def exits_per_million(self) -> float:
        """VM exits per million guest instructions."""
        return 1e6 * self.exits_total / self.instructions if self.instructions else 0.0


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """What a design did with a recording.

    design, recording: their names.
    whole: from the first record counted to the last. boot, workload: its parts before, and from, the first
        user-mode access (None where there is none).
    warm_up: records replayed before the first that is counted.
    accesses, table_stores, snapshot_words: operations done.
    physical_stores: table stores that no direct map reached, made at the gpa.
    faults: guest faults met.
    gpa_mismatches: accesses whose gpa is not the recorded one, those of the warm-up among them, for this is the check
        of the replay. mismatch_records: the first of them.
    pages_mean, pages_max: shadow pages in use, sampled at every record.
    audits: audits made. violations: (record, violation) of the first that found any; the replay ends there.
    seconds: time that the engine took, audits left out.
    cr3_loads: of the guest.
    windows: counters in each window of records, by name (see `windows.WindowLog`); None where none were asked for.
    future: how shadow pages were used, where that was recorded.
    exit_log: every exit, as `ExitLog.rows` has them; None where no log was asked for.
    """

    design: str
    recording: str
    whole: Phase
    boot: Phase | None
    workload: Phase | None
    accesses: int
    table_stores: int
    snapshot_words: int
    physical_stores: int
    faults: int
    gpa_mismatches: int
    mismatch_records: tuple[int, ...]
    pages_mean: float
    pages_max: int
    audits: int
    violations: tuple[tuple[int, Any], ...]
    seconds: float
    cr3_loads: int = 0
    warm_up: int = 0
    windows: dict[str, NDArray[np.uint64]] | None = dataclasses.field(default=None, compare=False, repr=False)
    future: Future | None = dataclasses.field(default=None, compare=False, repr=False)
    exit_log: NDArray[np.void] | None = dataclasses.field(default=None, compare=False, repr=False)

    def _repr_html_(self) -> str:
        return notebook.counters(
            f"{self.design} on {self.recording}: {self.whole.records:,} records", self.whole.counters
        )

    def as_dict(self) -> dict[str, Any]:
        """All but the windows and the future in plain types, as `shadowcore compare --json` prints it for a design."""
        plain = _phase_dict(self.whole)
        for name in (*_COUNTS, "pages_mean", "pages_max", "audits", "seconds", "warm_up"):
            plain[name] = getattr(self, name)
        plain["mismatch_records"] = list(self.mismatch_records)
        plain["violations"] = [{"record": record, "violation": str(what)} for record, what in self.violations]
        for name in ("boot", "workload"):
            phase = getattr(self, name)
            plain[name] = None if phase is None else _phase_dict(phase)
        return plain


def _phase_dict(phase: Phase) -> dict[str, Any]:
    counters = phase.counters
    return {
        "records": phase.records,
        "instructions": phase.instructions,
        "exits_total": phase.exits_total,
        "exits": phase.exits,
        "exits_per_million": phase.exits_per_million,
        "emulated": counters["pf_emulate"],
        "zapped": counters["mmu_shadow_zapped"],
        "flooded": counters["mmu_flooded"],
        "recycled": counters["mmu_recycled"],
        "walk_references": counters["walk_references"],
        "guest_walk_references": counters["guest_walk_references"],
        **unsync_counts(counters),
    }


def replay(
    recording: Recording | RecordingFile,
    mmu: str | Design = "cached",
    *,
    audit_every: int = 0,
    audit_at: Iterable[str] = (),
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    pool: int | None = None,
    window: int = 0,
    tlb: TLB | ProcessorTLB | None = None,
    warm_up: int = 0,
    future: Future | None = None,
    record_uses: bool = False,
    log_exits: bool = False,
) -> ReplayResult:
    """Run the guest of a recording on a design, and count.

    mmu: a design, or its name. pool: shadow pages in its pool (None: as the design says).
    audit_every: check every invariant after this many records, and at the end (0: never).
    audit_at: and at these points, `VM.audit_points`.
    start, stop: first record to replay and the one to stop before (None: the last). With a start, the guest's
        tables and registers are as they stand there, and the shadow MMU is new.
    progress: called now and then with the number of records done, and of all to do.
    window: count by windows of this many records (0: do not).
    tlb: a TLB to model. Without one every access walks: they are those that missed a TLB when they were recorded.
    warm_up: count from this record on, from `start`; what was replayed before it has warmed tables and shadow.
    future: for policy "optimal", how shadow pages will be used: `future` of the result of a replay of the same records
        with record_uses. Where policy "optimal" is asked for without one, that replay is made first.
    """
    made = design(mmu)
    if pool is not None and isinstance(made, Shadow):
        made = dataclasses.replace(made, pool_pages=pool)
    every = check_int("audit_every", audit_every, 0, 1 << 63)
    step = check_int("window", window, 0, 1 << 62)
    start = check_int("start", start, 0, recording.operations - 1)
    stop = recording.operations if stop is None else check_int("stop", stop, start + 1, recording.operations)
    split = recording.first_user
    split = stop if split is None else min(max(split, start), stop)
    begin = start + check_int("warm_up", warm_up, 0, stop - start - 1)

    # The tables that the first CR3 load needs are put in place, like all that lies before the start.
    if isinstance(made, Shadow) and made.policy == "optimal" and future is None:
        finds_out = recorder_of(made)
        future = replay(recording, finds_out, start=start, stop=stop, tlb=tlb, record_uses=True).future
    position = min(max(start, recording.first_cr3), stop)
    vm = _machine(recording, made, position, tlb, future, record_uses)
    vm.audit_points = audit_at
    vm.stats.reset()
    counts = dict.fromkeys(_COUNTS, 0)
    mismatches: list[int] = []
    replayed = pages_sum = pages_max = audits = 0
    violations: tuple[tuple[int, Any], ...] = ()
    counters_at_begin = counters_at_split = vm.stats.as_dict()
    instructions = {"boot": 0, "workload": 0}
    cr3_loads = 0
    seconds = 0.0
    log = WindowLog(vm.stats) if step else None
    exits = vm.record_exits(first=position) if log_exits else None
    warming = begin > start
    direct_map = recording.direct_map
    for base, piece in recording.pieces(start):
        # Numbers of records in this piece are those in the recording, less base.
        first, last = max(start - base, 0), min(stop - base, piece.operations)
        if last <= 0:
            break
        if position - base > first:
            counts["snapshot_words"] += int(piece.snapshot[first : min(position - base, last)].sum())
        arrays = piece.arrays | {"flags": piece_flags(piece, recording.first_user, base)}
        while position - base < last and not violations:
            if warming and position >= begin:
                warming = False
                counts = dict.fromkeys(_COUNTS, 0) | {"gpa_mismatches": counts["gpa_mismatches"]}
                replayed = pages_sum = pages_max = 0
                counters_at_begin = counters_at_split = vm.stats.as_dict()
                seconds = 0.0
                log = WindowLog(vm.stats) if step else None
                if exits is not None:
                    exits.clear()
            end = min(base + last, position + SLICE)
            if position < split:
                end = min(end, split)
            if warming:
                end = min(end, begin)
            if every:
                end = min(end, (position // every + 1) * every)
            if step:
                end = min(end, begin + max((position - begin) // step + 1, 0) * step)
            clock = time.perf_counter()
            try:
                done = replay_records(vm, arrays, position - base, end - base, direct_map)
            except AuditError as error:
                record = position if error.record is None else base + error.record
                violations = tuple((record, violation) for violation in error.violations)
                break
            seconds += time.perf_counter() - clock
            for name in _COUNTS:
                counts[name] += done[name]
            replayed += done["records"]
            pages_sum += done["pages_sum"]
            mismatches += [base + record for record in done["mismatch_records"]][: _MISMATCHES - len(mismatches)]
            pages_max = max(pages_max, done["pages_max"])
            if log is not None:
                insns = int(piece.insns[position - base : end - base].sum(dtype=np.uint64))
                log.pages(done["records"], done["pages_sum"], done["pages_max"])
                loads = int(np.count_nonzero(piece.kind[position - base : end - base] == LOAD_CR3))
                log.count(
                    instructions=insns,
                    guest_cr3_loads=loads,
                    **{name: done[name] for name in _COUNTS if name != "accesses"},
                )
                if (end - begin) % step == 0 or end == stop:
                    log.close(end - begin)
            position = end
            if position <= split:
                counters_at_split = vm.stats.as_dict()
            if every and (position % every == 0 or position == stop):
                audits += 1
                violations = tuple((position, violation) for violation in vm.audit().violations)
            if progress is not None:
                progress(position - start, stop - start)
        counted = min(max(begin - base, first), last)
        parted = min(max(split - base, counted), last)
        reached = min(max(position - base, counted), last)
        for name, low, high in (("boot", counted, min(parted, reached)), ("workload", parted, reached)):
            instructions[name] += int(piece.insns[low:high].sum(dtype=np.uint64)) if low < high else 0
        cr3_loads += int(np.count_nonzero(piece.kind[counted:reached] == LOAD_CR3))
        if violations:
            break

    def phase(name: str, first: int, last: int, before: dict[str, int], after: dict[str, int]) -> Phase:
        return Phase(last - first, instructions.get(name, sum(instructions.values())), grown(after, before))

    begin = min(begin, position)
    split = max(split, begin)
    final = vm.stats.as_dict()
    return ReplayResult(
        design=made.name,
        recording=recording.name,
        whole=phase("whole", begin, position, counters_at_begin, final),
        boot=phase("boot", begin, min(split, position), counters_at_begin, counters_at_split)
        if split > begin
        else None,
        workload=phase("workload", split, position, counters_at_split, final) if position > split else None,
        mismatch_records=tuple(mismatches),
        pages_mean=pages_sum / replayed if replayed else 0.0,
        pages_max=pages_max,
        audits=audits,
        violations=violations,
        seconds=seconds,
        cr3_loads=cr3_loads,
        warm_up=begin - start,
        windows=None if log is None else log.arrays(position - begin),
        future=Future.of(vm.mmu) if record_uses else None,
        exit_log=None if exits is None else exits.close(),
        **counts,
    )


def machine(reader: Reader, mmu: str | Design = "cached", tlb: TLB | ProcessorTLB | None = None) -> VM:
    """The virtual machine that a recording of operations starts on, under a design, as it was recorded: memory, and the
    same registers in each processor. TraceError for another stream, or where there can be no such machine."""
    start = reader.start()
    made = design(mmu)
    try:
        vm = VM(memory=start["memory"], mmu=made, vcpus=start["vcpus"], tlb=tlb)
    except ConfigError as error:
        raise TraceError(reader.path, None, f"a machine that can be expected: {error}") from None
    for words, values in reader.memory():
        vm.memory.words[words] = values
    for cpu in vm.vcpus:
        try:
            set_registers(vm, cpu, **{name: start[name] for name in ("cr0", "cr3", "cr4", "efer")})
            cpu.pkru, cpu.cr2, cpu.cpl, cpu.ac = start["pkru"], start["cr2"], start["cpl"], bool(start["ac"])
        except GeneralProtection:
            raise TraceError(reader.path, None, "registers that a processor can have expected") from None
    vm.stats.reset()
    return vm


def machine_at(recording: Recording | RecordingFile, mmu: str | Design = "cached", record: int | None = None) -> VM:
    """The virtual machine, its shadow included, as it stands just before record number `record` (None: at the end),
    after a replay from the beginning."""
    stop = recording.operations if record is None else check_int("record", record, 0, recording.operations)
    position = min(max(recording.first_cr3, 0), stop)
    vm = _machine(recording, design(mmu), position)
    vm.stats.reset()
    direct_map = recording.direct_map
    for base, piece in recording.pieces():
        first, last = position - base, min(stop - base, piece.operations)
        if 0 <= first < last:
            arrays = piece.arrays | {"flags": piece_flags(piece, recording.first_user, base)}
            replay_records(vm, arrays, first, last, direct_map)
            position = base + last
    return vm


def piece_flags(piece: Recording, first_user: int | None, base: int) -> NDArray[np.uint16]:
    """The flags with USER where a user acts, and SNAPSHOT where no store is made, and nowhere else.

    piece: of a recording, from record `base` on, whose workload begins at `first_user`.
    """
    flags = piece.flags.copy()
    user = piece.user_from(None if first_user is None else first_user - base)
    flags[(piece.kind == ACCESS) & ~user] &= ~np.uint16(USER)
    flags[(piece.kind == STORE) & ~piece.snapshot] &= ~np.uint16(SNAPSHOT)
    return flags


def _machine(
    recording: Recording | RecordingFile,
    made: Design,
    record: int,
    tlb: TLB | ProcessorTLB | None = None,
    future: Future | None = None,
    record_uses: bool = False,
) -> VM:
    """A VM as the guest was just before `record` (a first CR3 load at `record` itself is taken early)."""
    vm = VM(
        memory=recording.memory_size,
        mmu=made,
        tlb=tlb,
        vcpus=recording.vcpus,
        features=Features(maxphyaddr=52),
        future=future,
        record_uses=record_uses,
    )
    registers = [{"cr0": RESET_CR0, "cr3": 0, "cr4": 0, "efer": 0} for _ in vm.vcpus]
    registers[0] |= {name: getattr(recording, name) for name in ("cr0", "cr4", "efer")}
    frames = vm.memory.words.reshape(-1, 512)
    for base, piece in recording.pieces():
        before = record - base
        if before < 0:
            break
        words, values, begun = _tables_at(piece, min(before, piece.operations))
        if base:  # memory is new in the first piece
            frames[begun] = 0
        vm.memory.words[words] = values
        for number, known in enumerate(registers):
            own = piece.vcpu == number
            for kind, names in ((LOAD_CR, ("cr0", "cr4")), (LOAD_EFER, ("efer",)), (LOAD_CR3, ("cr3",))):
                loads = np.flatnonzero((own & (piece.kind == kind))[: before + (kind == LOAD_CR3)])
                if len(loads):
                    known |= zip(names, (int(piece.addr[loads[-1]]), int(piece.value[loads[-1]])), strict=False)
    for cpu, known in zip(vm.vcpus, registers, strict=True):
        cpu.ac = True  # What the guest's kernel did to user pages under SMAP, it did with EFLAGS.AC set.
        try:
            set_registers(vm, cpu, **known)
        except GeneralProtection:
            shown = ", ".join(f"{name} {known[name]:#x}" for name in ("cr0", "cr4", "efer"))
            expected = f"registers that a processor can have expected, not {shown}"
            raise TraceError(recording.name, record, expected) from None
    return vm


def _tables_at(piece: Recording, record: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """What the guest's tables came to by the records of a piece before `record`.

    Numbers (gpa / 8) and values of words, and the gfns of tables that began: but for those words they are 0.
    """
    while record < piece.operations and piece.snapshot[record]:
        record += 1
    kind, addr = piece.kind[:record], piece.addr[:record]
    stores = np.flatnonzero(kind == STORE)[::-1]
    words, newest = np.unique(addr[stores] >> np.uint64(3), return_index=True)
    stores = stores[newest]
    tables = np.flatnonzero(kind == TABLE)
    begun, last = np.unique((addr[tables] >> np.uint64(12))[::-1], return_index=True)
    # Of each word's frame, the record at which it last began to serve, if it did.
    frames = words >> np.uint64(9)
    at = np.minimum(np.searchsorted(begun, frames), max(len(begun) - 1, 0))
    live = np.ones(len(words), dtype=np.bool_)
    if len(begun):
        live = (begun[at] != frames) | (stores >= tables[::-1][last][at])
    return words[live], piece.value[stores[live]], begun
