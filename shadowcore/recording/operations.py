"""Recordings of operations run again, on the machine that they start on, under some design."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import TLB, Design, Op, check_int
from ..engine.audits import Audits
from ..engine.tlbs import ProcessorTLB
from ..engine.windows import WindowLog, grown
from .reader import Reader
from .replay import SLICE, machine

_FAULTS = (1, 2)
"""Outcomes that are guest faults: #PF and #GP."""
_MMIO = 3
PART = 256
"""Operations that are done at once, at least, where windows do not end: a look at counters costs as much."""


@dataclasses.dataclass(frozen=True)
class OperationsResult:
    """What a design did with a recording of operations.

    design, recording: their names. operations: those counted; warm_up: those done before them.
    stats: what the counters of VM.stats grew by.
    counts: of operations, by the names of sc.Op in small letters; `guest_faults` and `mmio`, how many ended so.
    history: checksum over outcome, error code, gpa and value of each operation, from the first: the guest did the same
        where it is the same.
    pages_mean, pages_max: shadow pages in use, sampled; windows: as a ReplayResult has them; both None without windows.
    audits: how many were made. seconds: that the engine took for what is counted.
    exit_log: every exit, as `ExitLog.rows` has them; None where no log was asked for.
    """

    design: str
    recording: str
    operations: int
    warm_up: int
    stats: dict[str, int]
    counts: dict[str, int]
    history: int
    seconds: float
    audits: int
    windows: dict[str, NDArray[np.uint64]] | None = dataclasses.field(default=None, compare=False)
    pages_mean: float | None = None
    pages_max: int | None = None
    exit_log: NDArray[np.void] | None = dataclasses.field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """All but the windows and the log of exits in plain types."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["windows"], plain["exit_log"]
        return plain


def run(
    path: str | os.PathLike[str],
    mmu: str | Design = "cached",
    *,
    operations: int | None = None,
    audit_every: int = 0,
    audit_at: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
    window: int = 0,
    tlb: TLB | ProcessorTLB | None = None,
    warm_up: int = 0,
    log_exits: bool = False,
) -> OperationsResult:
    """Run the operations of a recording, with their data.

    operations: of them, from the first, at most (None: all). window, tlb, progress: as of `trace.replay`.
    warm_up: of them, those that come first and are not counted. log_exits: keep a log of all exits that are counted.
    audit_every, audit_at: check all invariants after so many, and at the end, and at points of VM.audit_points:
    AuditError. ConfigError, TraceError.
    """
    every = check_int("audit_every", audit_every, 0, 1 << 62)
    step = check_int("window", window, 0, 1 << 62)
    limit = None if operations is None else check_int("operations", operations, 1, 1 << 62)
    with Reader(path) as reader:
        vm = machine(reader, mmu, tlb)
        total = reader.records if limit is None else min(limit, reader.records)
        warm = check_int("warm_up", warm_up, 0, max(total - 1, 0))
        vm.audit_points = audit_at
        audits = Audits(vm, every)
        digest = hashlib.blake2b(digest_size=8)
        stats, log = vm.stats.as_dict(), WindowLog(vm.stats)
        counts = dict.fromkeys((*(op.name.lower() for op in Op), "guest_faults", "mmio"), 0)
        done, begun, seconds = 0, 0, 0.0
        exits = vm.record_exits() if log_exits else None
        with audits.told(lambda: done):
            for part in _parts(reader, total, warm, step, every):
                clock = time.perf_counter()
                result = vm.vcpus[0].run(part)
                seconds += time.perf_counter() - clock
                done += len(part)
                for array in (result.outcome, result.error_code, result.gpa, result.value):
                    digest.update(array.tobytes())
                if done <= warm:
                    if done == warm:
                        begun, seconds = done, 0.0
                        stats, log = vm.stats.as_dict(), WindowLog(vm.stats)
                        if exits is not None:
                            exits.clear()
                else:
                    found = _counted(part, result.outcome)
                    counts = {name: number + found.get(name, 0) for name, number in counts.items()}
                    pages = vm.stats.mmu_cache_miss - vm.stats.page_frees
                    log.pages(len(part), pages * len(part), pages)
                    log.count(faults=found["guest_faults"], guest_cr3_loads=found["cr3"])
                    if step and (done - begun) % step == 0:
                        log.close(done - begun)
                if audits.due(done):
                    audits.look(done)
                if progress is not None:
                    progress(done, total)
            audits.look(done)
        windows = log.arrays(done - begun) if step else None
        return OperationsResult(
            design=vm.mmu.design.name,
            recording=reader.name,
            operations=done - begun,
            warm_up=begun,
            stats=grown(vm.stats.as_dict(), stats),
            counts=counts,
            history=int.from_bytes(digest.digest(), "little"),
            seconds=seconds,
            audits=audits.made,
            exit_log=None if exits is None else exits.close(),
            windows=windows,
            pages_mean=None if windows is None else log.pages_mean,
            pages_max=None if windows is None else int(windows["pages_max"].max(initial=0)),
        )


def _parts(reader: Reader, total: int, warm: int, step: int, every: int) -> Iterator[NDArray[np.void]]:
    """The operations in parts that end with the warm-up, with windows and eighths of long ones, and where audits are
    due."""
    done = 0
    for block in reader.operations():
        at, length = 0, min(len(block), total - done)
        while at < length:
            size = min(SLICE, length - at)
            if done < warm:
                size = min(size, warm - done)
            elif step:
                size = min(size, step - (done - warm) % step, max(PART, step // 8))
            if every:
                size = min(size, every - done % every)
            yield block[at : at + size]
            at, done = at + size, done + size
        if done >= total:
            return


def _counted(part: NDArray[np.void], outcome: NDArray[np.uint8]) -> dict[str, int]:
    by_op = np.bincount(part["op"], minlength=max(Op) + 1).tolist()
    found = {op.name.lower(): by_op[op] for op in Op}
    ended = np.bincount(outcome, minlength=_MMIO + 1).tolist()
    return found | {"guest_faults": sum(ended[code] for code in _FAULTS), "mmio": ended[_MMIO]}
