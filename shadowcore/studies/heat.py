"""Where a guest is busy: accesses by frame and by address space, over time, and the exits of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import TLB, Design, Features, Op, check_int, design
from ..engine.machine import VM
from ..engine.tlbs import ProcessorTLB
from ..errors import ConfigError
from ..guest.kernel import Kernel
from ..guest.options import KernelOptions
from ..recording.guest import Recording, RecordingFile
from ..recording.kinds import ACCESS, LOAD_CR3, STORE
from ..recording.records import replay as replay_records
from ..recording.replay import SLICE, _machine, piece_flags
from ..workload import find, run

__all__ = [
    "heat",
    "of_workload",
]

ROOT = np.uint64(0x000F_FFFF_FFFF_F000)
"""Of CR3, the bits that say where the root is: the rest are a PCID, flags, and bit 63. (PAE: 32 bytes, same frame.)"""

_ACCESSES = (Op.READ, Op.WRITE, Op.FETCH, Op.CMPXCHG, Op.XCHG, Op.ADD, Op.AND, Op.OR, Op.XOR)
_LOADS = {"cr0": Op.CR0, "cr3": Op.CR3, "cr4": Op.CR4, "efer": Op.EFER, "invlpg": Op.INVLPG}


def heat(
    recording: Recording | RecordingFile,
    designs: Iterable[str | Design] = (),
    *,
    bins: int = 120,
    rows: int = 64,
    start: int = 0,
    stop: int | None = None,
    warm_up: int = 0,
) -> dict[str, dict[str, Any]]:
    """Heat of a recording, for a report: {"frames": ..., "processes": ...}.

    frames: `counts`, accesses and table stores by region of guest memory (row) and stretch of records (column);
        `first_frame`: the gfn where each region begins; `frames_per_row`.
    processes: `counts`, the same by address space: the root that CR3 points at, in the order of first loads, without
        those that did nothing; `names`; `exits`: by design, VM exits while it was loaded, from a replay under each of
        `designs`. The exit of a CR3 load is that of the address space that is loaded.
    Both have `operation`: the number of records counted at which each column ends.

    bins, rows: columns, and regions of memory up to the last frame that is used, at most.
    start, stop, warm_up: records to look at, as of `trace.replay`.
    """
    start = check_int("start", start, 0, recording.operations - 1)
    stop = recording.operations if stop is None else check_int("stop", stop, start + 1, recording.operations)
    begin = start + check_int("warm_up", warm_up, 0, stop - start - 1)
    bins = min(check_int("bins", bins, 1, 1 << 16), stop - begin)
    frames = recording.nframes
    per_row = _fine(frames, rows)
    ends = begin + np.arange(1, bins + 1, dtype=np.int64) * (stop - begin) // bins
    regions = np.zeros((-(-frames // per_row), bins), dtype=np.uint64)
    spaces = _Spaces(bins)
    for base, piece in recording.pieces():
        stores = (piece.kind == STORE) & ~piece.snapshot
        here = np.arange(base, base + piece.operations)
        busy = ((piece.kind == ACCESS) | stores) & (here >= begin) & (here < stop)
        gpa = np.where(stores, piece.addr, piece.value) >> np.uint64(12)
        columns = np.searchsorted(ends, here, side="right")
        inside = busy & (gpa < np.uint64(frames))  # what lies beyond is a device
        row = (gpa[inside] // np.uint64(per_row)).astype(np.int64)
        regions += _matrix(row, columns[inside], regions.shape)
        number = spaces.numbers(piece.kind == LOAD_CR3, piece.addr)
        spaces.add("accesses", number[busy], columns[busy])
    made = [design(each) for each in designs]
    for each in made:
        _exits(recording, each, spaces, start, begin, ends)
    return _made(
        *_coarse(regions, per_row, rows), spaces, [each.name for each in made], (ends - begin).astype(np.uint64)
    )


def of_workload(
    name: str,
    designs: Iterable[str | Design] = ("native",),
    *,
    operations: int = 1_000_000,
    seed: int = 0,
    options: KernelOptions | None = None,
    memory: str | int | None = None,
    tlb: TLB | ProcessorTLB | None = None,
    bins: int = 120,
    rows: int = 64,
    **parameters: Any,
) -> dict[str, dict[str, Any]]:
    """The same of a workload, from the operations of its processor, which are kept (19 bytes each) and repeated.

    designs: at least one. memory: of the machine (None: what the workload needs). The rest as of `workload.run` and
    `heat`. Columns end at numbers of operations after the setup, in which each store of a string instruction is one:
    `axis` says so.
    """
    found = find(name)
    made = [design(each) for each in designs]
    if not made:
        raise ConfigError("designs: at least one is needed")
    chosen = options or KernelOptions()
    needed = {key: max(value, getattr(chosen, key)) for key, value in found.options.items()}
    chosen = dataclasses.replace(chosen, seed=seed, **needed)

    def machine(which: Design) -> VM:
        return VM(found.memory if memory is None else memory, which, tlb=tlb, features=Features())

    def recorded(count: int) -> NDArray[Any]:
        given: dict[str, Any] = parameters | {"operations": count, "seed": seed, "options": options, "record": True}
        kept = run(name, machine(made[0]), **given).recording
        assert kept is not None
        return kept

    ops = recorded(check_int("operations", operations, 1, 1 << 62))
    setup = len(recorded(0))
    total = len(ops) - setup
    bins = min(check_int("bins", bins, 1, 1 << 16), total)
    ends = np.arange(1, bins + 1, dtype=np.int64) * total // bins
    spaces = _Spaces(bins)
    for place, each in enumerate(made):
        vm = machine(each)
        Kernel(vm, chosen)
        cpu = vm.vcpus[0]
        frames = vm.memory.bytes.size >> 12
        if not place:
            per_row = _fine(frames, rows)
            regions = np.zeros((-(-frames // per_row), bins), dtype=np.uint64)
        cpu.run(ops[:setup])
        spaces.load(int(cpu.cr3))
        for base in range(0, total, SLICE):
            piece = ops[setup + base : setup + base + SLICE]
            result = cpu.run(piece)
            column = np.searchsorted(ends, np.arange(base, base + len(piece)), side="right")
            number = spaces.numbers(piece["op"] == Op.CR3, piece["value"])
            exits = result.exits.astype(np.int64)  # page faults
            for reason, op in _LOADS.items():
                # Under one design all of a kind exit, or none do.
                exits[np.flatnonzero(piece["op"] == op)[: result.stats.exits[reason]]] += 1
            spaces.add(each.name, np.repeat(number, exits), np.repeat(column, exits))
            if not place:
                reached = np.isin(piece["op"], _ACCESSES) & (result.outcome == 0)
                spaces.add("accesses", number[reached], column[reached])
                inside = reached & (result.gpa < np.uint64(frames << 12))
                row = (result.gpa[inside] >> np.uint64(12)) // np.uint64(per_row)
                regions += _matrix(row.astype(np.int64), column[inside], regions.shape)
    warm = _made(*_coarse(regions, per_row, rows), spaces, [each.name for each in made], ends.astype(np.uint64))
    for part in warm.values():
        part["axis"] = "operations, string instructions store by store"
    return warm


def _fine(frames: int, rows: int) -> int:
    """Frames in a row while counting: 128 times as many rows as there will be, for it may be that few are used."""
    return -(-frames // min(128 * check_int("rows", rows, 1, 1 << 10), frames))


def _coarse(regions: NDArray[np.uint64], per_row: int, rows: int) -> tuple[NDArray[np.uint64], int]:
    """At most `rows` rows of memory up to the last that is used, and the frames in each."""
    used = int(np.flatnonzero(regions.any(axis=1)).max(initial=0)) + 1
    together = -(-used // rows)
    return np.add.reduceat(regions[:used], np.arange(0, used, together), axis=0), per_row * together


def _made(
    regions: NDArray[np.uint64], per_row: int, spaces: _Spaces, designs: list[str], operation: NDArray[np.uint64]
) -> dict[str, dict[str, Any]]:
    counts = spaces.matrix("accesses")
    exits = {name: spaces.matrix(name) for name in designs}
    seen = counts.any(axis=1) | np.any([matrix.any(axis=1) for matrix in exits.values()], axis=0)
    names = [f"CR3 {root:#x}" if root is not None else "before the first CR3 load" for root in spaces.roots]
    return {
        "frames": {
            "counts": regions,
            "first_frame": np.arange(len(regions), dtype=np.uint64) * np.uint64(per_row),
            "frames_per_row": per_row,
            "operation": operation,
        },
        "processes": {
            "counts": counts[seen],
            "names": [name for name, kept in zip(names, seen.tolist(), strict=True) if kept],
            "exits": {name: matrix[seen] for name, matrix in exits.items()},
            "operation": operation,
        },
    }


def _matrix(row: NDArray[np.int64], column: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.uint64]:
    flat = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.uint64)


class _Spaces:
    """Address spaces by the root that CR3 points at, numbered as they come, and what was counted of each."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.roots: list[int | None] = []
        self._numbers: dict[int | None, int] = {}
        self._counts: dict[str, NDArray[np.uint64]] = {}
        self._loaded: int | None = None

    def number(self, root: int | None) -> int:
        if root not in self._numbers:
            self._numbers[root] = len(self.roots)
            self.roots.append(root)
        return self._numbers[root]

    def load(self, cr3: int) -> None:
        """What is loaded before the next piece."""
        self._loaded = cr3 & int(ROOT)

    def numbers(self, loading: NDArray[np.bool_], cr3: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each operation of the next piece, the number of the address space that it is in; `loading`: those that
        load `cr3`."""
        loads = np.flatnonzero(loading)
        before = self.number(self._loaded) if not len(loads) or loads[0] else -1
        roots = (cr3[loads] & ROOT).tolist()
        if roots:
            self._loaded = roots[-1]
        numbers = np.array([before, *map(self.number, roots)], dtype=np.int64)
        return np.repeat(numbers, np.diff(np.concatenate(([0], loads, [len(loading)]))))

    def matrix(self, what: str) -> NDArray[np.uint64]:
        """Counts by number and column."""
        found = self._counts.get(what, np.zeros((0, self.bins), dtype=np.uint64))
        whole = np.zeros((len(self.roots), self.bins), dtype=np.uint64)
        whole[: len(found)] = found
        return whole

    def add(self, what: str, numbers: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        whole = self.matrix(what)
        self._counts[what] = whole + _matrix(numbers, columns, (len(self.roots), self.bins))

    def add_one(self, what: str, number: int, column: int, count: int) -> None:
        if len(self._counts.get(what, ())) <= number:
            self._counts[what] = self.matrix(what)
        self._counts[what][number, column] += np.uint64(count)


def _exits(
    recording: Recording | RecordingFile,
    made: Design,
    spaces: _Spaces,
    start: int,
    counted: int,
    ends: NDArray[np.int64],
) -> None:
    """Replay, from one CR3 load or end of a column to the next, and add the exits of each stretch from `counted` on."""
    stop = int(ends[-1])
    position = min(max(start, recording.first_cr3), stop)
    vm = _machine(recording, made, position)
    vm.stats.reset()
    before = 0
    loaded = None
    for base, piece in recording.pieces():
        loads = np.flatnonzero(piece.kind[: max(position - base, 0)] == LOAD_CR3)
        loaded = int(piece.addr[loads[-1]] & ROOT) if len(loads) else loaded
        if base + piece.operations > position:
            break
    for base, piece in recording.pieces(position):
        arrays = piece.arrays | {"flags": piece_flags(piece, recording.first_user, base)}
        loads = np.flatnonzero(piece.kind == LOAD_CR3)
        roots = dict(zip(loads.tolist(), (piece.addr[loads] & ROOT).tolist(), strict=True))
        strips = np.arange(0, piece.operations, SLICE)
        cuts = np.unique(np.concatenate((loads, strips, ends - base, [counted - base, piece.operations])))
        cuts = cuts[(cuts > max(position - base, 0)) & (cuts <= min(piece.operations, stop - base))]
        begin = max(position - base, 0)
        for end in cuts.tolist():
            loaded = roots.get(begin, loaded)
            replay_records(vm, arrays, begin, end, recording.direct_map)
            after = vm.stats.exits_total
            if after > before and base + begin >= counted:
                column = int(np.searchsorted(ends, base + begin, side="right"))
                spaces.add_one(made.name, spaces.number(loaded), column, after - before)
            before, begin = after, end
