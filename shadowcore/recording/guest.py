"""Recordings of running guests: what they hold, and reading them with every record checked.

A recording is an .npz file of what a guest's processors did, in order. Its arrays have one element per record:

    kind (u1)    addr (u8)        value (u8)        flags (u2)
    1 LOAD_CR3   the new CR3
    2 LOAD_CR    CR0              CR4               one of the two has changed
    3 STORE      gpa of a store   the aligned       bits 0-2: level of the table; bits 4-6: bytes stored, 0
                 to a table       entry after it    for eight; bit 7: see Recording.snapshot
    4 TABLE      gpa of a frame                     bits 0-3: level. It begins to serve as a table: words that
                                                    are not 0 follow as STOREs, all others are 0
    5 INVLPG     linear address
    6 ACCESS     linear address   gpa reached       bit 0: write; bit 1: user, see Recording.user; bit 2: fetch;
                                                    bits 4-7: log2 of its bytes, plus 1 (0: not known);
                                                    bits 8-9: CPL, if bit 10 says that it is known
    7 TABLE_END  gpa of a frame                     bits 0-3: level. It ceases to serve as a table
    8 LOAD_EFER  EFER
    9 INVPCID    linear address   PCID              bits 0-1: its type
    10 MARK      a number                           the guest marks a place

and insns (u4): instructions executed since the record before. Accesses are those that missed a filter. Frames
that never serve as tables have no contents. Four scalars: cr0, cr4 and efer at the start, and nframes, guest
RAM in frames of 4096 bytes; and, where it is false alone, complete (bool): the recording ended before its time.
Where there are several processors, vcpu (u1) is the number of each record's, and a scalar vcpus how many there are.
Those other than 0 start as after a reset.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import check_int
from ..errors import TraceError
from ..files import Replacement, check_path
from .format import GUEST, STREAMS, SUFFIX
from .kinds import (
    ACCESS,
    CPL_KNOWN,
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
)
from .npz import read_arrays
from .reader import Reader, is_recording
from .survey import Survey, first_of
from .writer import Writer

BUNDLED = "linux-mix-pti"
"""The recording that ships with the package: Debian's 6.1 kernel with page-table isolation, from boot through shell
pipelines, an interpreter, work on files, and a server. recorder/make-recording.sh makes it."""

_ARRAYS = STREAMS[GUEST]
_SCALARS = {"cr0": (1 << 64) - 1, "cr4": (1 << 64) - 1, "efer": (1 << 64) - 1, "nframes": 1 << 40, "vcpus": 1 << 8}
_OPTIONAL = ("complete", "vcpu", "vcpus")
MEMBERS = (*_ARRAYS, *_SCALARS, "complete")
"""What an .npz recording holds."""
_TABLE_MAX = 1 << 16
"""Records that a piece of a recording may exceed a block by, for the words of a table not to be parted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """What a guest did: arrays of one length, read-only, one element a record. TraceError if they cannot be.

    kind: u1, 1 to 10 (LOAD_CR3 ... MARK). flags: u2, by kind.
    insns: u4, instructions since the record before.
    addr, value: u8: linear addresses, gpas and values, by kind.
    cr0, cr4, efer: registers at the start. nframes: guest RAM in frames of 4096 bytes.
    name: what reports call it. complete: False if it ended before its time.
    vcpus: number of processors. vcpu: u1, the processor that did it (None: 0 in all records).
    marks: names of phases, by the number of the mark that begins each.
    """

    name: str
    kind: NDArray[np.uint8]
    flags: NDArray[np.uint16]
    insns: NDArray[np.uint32]
    addr: NDArray[np.uint64]
    value: NDArray[np.uint64]
    cr0: int
    cr4: int
    efer: int
    nframes: int
    complete: bool = True
    vcpus: int = 1
    vcpu: Any = None
    marks: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vcpu is None:
            object.__setattr__(self, "vcpu", np.zeros(len(self.kind), dtype=np.uint8))
        for name, dtype in _ARRAYS.items():
            array = np.asarray(getattr(self, name))
            if array.dtype != np.dtype(dtype) or array.ndim != 1:
                expected = f"array {name!r}: one dimension of {np.dtype(dtype)} expected"
                raise TraceError(self.name, None, f"{expected}, not {array.ndim} of {array.dtype}")
            if len(array) != len(self.kind):
                expected = f"array {name!r}: {len(self.kind)} records expected, as in 'kind'"
                raise TraceError(self.name, None, f"{expected}, not {len(array)}")
            array = np.ascontiguousarray(array).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        for name in _SCALARS:
            object.__setattr__(self, name, _scalar(self.name, name, getattr(self, name)))
        if not self.operations:
            raise TraceError(self.name, None, "at least one record expected")
        self._check_records()

    def _check_records(self) -> None:
        """TraceError for the first record that breaks a rule of the format (rules are taken one by one)."""
        kind, flags, addr, snapshot = self.kind, self.flags, self.addr, self.snapshot
        size = np.uint64(self.memory_size)
        store, frame = kind == STORE, (kind == TABLE) | (kind == TABLE_END)
        length = (flags >> 4 & 7).astype(np.uint64)
        length[(length == 0) | snapshot] = 8
        level = np.where(store, flags & 7, flags & 15)
        rules = [
            ((kind < LOAD_CR3) | (kind > MARK), "kind", f"a kind from 1 to {MARK}"),
            (self.vcpu >= self.vcpus, "vcpu", f"a processor below {self.vcpus}"),
            (
                (store | frame) & ((level < 1) | (level > 5)),
                "flags",
                "a table level from 1 to 5 in the flags",
            ),
            (store & ~np.isin(length, (1, 2, 4, 8)), "flags", "a store of 1, 2, 4 or 8 bytes in the flags"),
            (
                snapshot & (addr % np.uint64(8) != 0),
                "addr",
                "a multiple of 8 as the gpa of a snapshot's word",
            ),
            (
                store & (addr % np.uint64(8) + length > np.uint64(8)),
                "addr",
                "a store within one aligned entry of 8 bytes",
            ),
            (frame & (addr % np.uint64(4096) != 0), "addr", "a multiple of 4096 as the gpa of a table"),
            ((store | frame) & (addr >= size), "addr", f"a gpa below the end of memory, {int(size):#x}"),
        ]
        for broken, field, expected in rules:
            record = first_of(broken)
            if record is not None:
                value = int(getattr(self, field)[record])
                raise TraceError(self.name, record, f"{expected} expected, not {field} {value:#x}")

    @property
    def operations(self) -> int:
        """Number of records."""
        return len(self.kind)

    @property
    def memory_size(self) -> int:
        """Guest RAM in bytes."""
        return self.nframes << 12

    @cached_property
    def instructions(self) -> int:
        """Guest instructions that the recording spans."""
        return int(self.insns.sum(dtype=np.uint64))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Records by what they are."""
        by_kind = np.bincount(self.kind, minlength=MARK + 1).tolist()
        words = int(self.snapshot.sum())
        return {
            "cr3_loads": by_kind[LOAD_CR3],
            "cr0_cr4_loads": by_kind[LOAD_CR],
            "table_stores": by_kind[STORE] - words,
            "snapshot_words": words,
            "tables": by_kind[TABLE],
            "invlpg": by_kind[INVLPG],
            "accesses": by_kind[ACCESS],
            "tables_ended": by_kind[TABLE_END],
            "efer_loads": by_kind[LOAD_EFER],
            "invpcid": by_kind[INVPCID],
            "marks": by_kind[MARK],
        }

    @cached_property
    def snapshot(self) -> NDArray[np.bool_]:
        """For each record, whether it is a word of a table as it stood when it began to serve.

        Such words follow the TABLE record of their frame. The other stores with the flag SNAPSHOT are made by
        the guest, to a frame that has ceased to serve: it clears tables late, often byte by byte.
        """
        flagged = (self.kind == STORE) & (self.flags & SNAPSHOT != 0)
        frame = self.addr >> np.uint64(12)
        same = np.zeros(self.operations, dtype=np.bool_)
        same[1:] = frame[1:] == frame[:-1]
        begins = np.flatnonzero(~(flagged & same))  # each record that does not go on with the one before it
        tables = begins[self.kind[begins] == TABLE]
        ends = np.append(begins, self.operations)[np.searchsorted(begins, tables) + 1]
        mask = np.zeros(self.operations + 1, dtype=np.int8)
        mask[tables + 1] += 1
        mask[ends] -= 1
        return np.cumsum(mask[:-1], dtype=np.int8).astype(np.bool_)

    @cached_property
    def _survey(self) -> Survey:
        survey = Survey(self.cr4, self.vcpus)
        survey.add(0, self.arrays)
        survey.end()
        return survey

    @property
    def first_user(self) -> int | None:
        """Number of the first user-mode access: before it the guest boots, from it on there is a workload.

        Where the CPL is known that is all. In older recordings the user flag follows the half of the address space
        that the instruction lies in, so that boot code at low addresses carries it as well. There, linear addresses
        are physical ones, which tells it apart: user code begins where most of the next 16 flagged accesses reach
        another address.
        """
        return self._survey.first_user

    @cached_property
    def user(self) -> NDArray[np.bool_]:
        """For each record, whether it is a user-mode access.

        Where the CPL is known, the flag says so. Elsewhere boot code is not (see first_user). Nor is an access to the
        upper half of the address space: where a user instruction is interrupted, the processor reads tables and
        pushes a frame as supervisor.
        """
        return self.user_from(self.first_user)

    def user_from(self, first: int | None) -> NDArray[np.bool_]:
        """The same, where the workload begins at record `first`."""
        mask: NDArray[np.bool_] = (self.kind == ACCESS) & (self.flags & USER != 0)
        mask &= self.addr >> np.uint64(63) == 0
        mask[: self.operations if first is None else max(first, 0)] = False
        known = self.flags & CPL_KNOWN != 0
        mask[known] = ((self.kind == ACCESS) & (self.flags & USER != 0))[known]
        return mask

    @property
    def direct_map(self) -> int:
        """Linear address at which the guest maps all of its memory.

        Where the access that carried a table store was recorded as well, just before it, its addresses tell;
        without any, it is where 64-bit Linux has it unless it is moved at random.
        """
        return self._survey.direct_map

    @property
    def first_cr3(self) -> int:
        """Number of the first CR3 load, 0 without one: the records before it are tables that it needs."""
        return self._survey.first_cr3 or 0

    @property
    def holdings(self) -> dict[str, Any]:
        """What it has and lacks, by name: fetches, sizes, cpl, efer, pcids, invpcid, large_pages, vcpus, marks."""
        return self._survey.holdings

    @property
    def phases(self) -> dict[str, int]:
        """By name, the record at which a phase begins; `boot`: at which it ends.

        Boot ends at the first user-mode access. Each mark begins a phase, called mark-NUMBER unless the file names it.
        """
        return _phases(self)

    def pieces(self, first: int = 0) -> Iterator[tuple[int, Recording]]:
        """The recording in one piece, as (number of its first record, piece)."""
        yield 0, self

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of records by name."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def head(self, records: int) -> Recording:
        """The recording cut after this many records."""
        check_int("records", records, 1, self.operations)
        cut: dict[str, Any] = {name: array[:records] for name, array in self.arrays.items()}
        return dataclasses.replace(self, **cut)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` reads: a recording by blocks if its name ends in .screc, else an .npz file."""
        path = check_path(path)
        if Path(path).suffix == SUFFIX:
            with Writer(path, GUEST, name=self.name, guest={name: getattr(self, name) for name in _SCALARS}) as writer:
                writer.write(**self.arrays)
                writer.close(complete=self.complete)
            return
        scalars: dict[str, Any] = {name: np.uint64(getattr(self, name)) for name in _SCALARS}
        arrays = self.arrays
        if self.vcpus == 1:
            del scalars["vcpus"], arrays["vcpu"]
        if not self.complete:
            scalars["complete"] = np.bool_(False)
        name = os.fspath(path)
        with Replacement(name if name.endswith(".npz") else f"{name}.npz") as file:
            np.savez_compressed(file, **arrays, **scalars)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Recording({self.name!r}, {self.operations} records, {self.instructions} instructions)"


class RecordingFile:
    """A guest's recording in a file of blocks, read piece by piece: of any length, in bounded memory.

    It has the attributes of Recording but for the arrays. Those that depend on all records (first_user, ...) are found
    by reading the file once, when they are first asked for. TraceError for the first record that cannot be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_path(path)
        with self._open() as reader:
            self.name = reader.name
            self.operations = reader.records
            self.complete = reader.complete
            self.marks = _named(reader.source)
            values = [_scalar(path, name, np.uint64(reader.guest[name])) for name in _SCALARS]
        self.cr0, self.cr4, self.efer, self.nframes, self.vcpus = values
        if not self.operations:
            raise TraceError(path, None, "at least one record expected")

    def _open(self) -> Reader:
        reader = Reader(self.path)
        if reader.stream != GUEST:
            reader.close()
            raise TraceError(self.path, None, f"a recording of a guest expected, not of {reader.stream}")
        return reader

    def pieces(self, first: int = 0) -> Iterator[tuple[int, Recording]]:
        """The records in order, as (number of its first record, piece), from a piece with record `first` on.

        No piece begins within what belongs together: a table with its words, a store with the access before it.
        """
        begin, held = 0, {name: np.zeros(0, dtype=dtype) for name, dtype in _ARRAYS.items()}
        with self._open() as reader:
            # A table that begins before the first block ends well before the record that is asked for.
            for block in reader.blocks(max(first - 2 * _TABLE_MAX, 0)):
                new = not len(held["kind"])
                held = {name: np.concatenate((held[name], block.columns[name])) for name in _ARRAYS}
                cuts = _cuts(held["kind"], held["flags"], held["addr"])
                skipped = 0
                if new:
                    begin = block.first
                    skipped = int(cuts[0]) if begin and len(cuts) and block.first < first else 0
                cut = int(cuts[-1]) if len(cuts) else 0
                length = len(held["kind"])
                if not cut and length > _TABLE_MAX + block.records:
                    if held["kind"][0] == TABLE:
                        raise TraceError(self.path, begin, f"a table of {_TABLE_MAX} words at most expected")
                    cut = length - 1  # stores to a frame that has ceased to serve: they do not belong together
                if cut > skipped:
                    yield begin + skipped, self._piece(begin + skipped, {k: v[skipped:cut] for k, v in held.items()})
                held = {name: array[cut:] for name, array in held.items()}
                begin += cut
            if len(held["kind"]):
                yield begin, self._piece(begin, held)

    def _piece(self, begin: int, arrays: dict[str, NDArray[Any]]) -> Recording:
        scalars = {name: getattr(self, name) for name in _SCALARS}
        members: dict[str, Any] = arrays | scalars
        try:
            return Recording(name=self.name, complete=self.complete, marks=self.marks, **members)
        except TraceError as error:
            raise TraceError(self.path, begin + (error.record or 0), error.expected) from None

    @cached_property
    def _survey(self) -> Survey:
        survey = Survey(self.cr4, self.vcpus)
        for first, piece in self.pieces():
            survey.add(first, piece.arrays)
        survey.end()
        return survey

    @property
    def memory_size(self) -> int:
        """Guest RAM in bytes."""
        return self.nframes << 12

    @property
    def first_user(self) -> int | None:
        """As Recording.first_user."""
        return self._survey.first_user

    @property
    def first_cr3(self) -> int:
        """As Recording.first_cr3."""
        return self._survey.first_cr3 or 0

    @property
    def direct_map(self) -> int:
        """As Recording.direct_map."""
        return self._survey.direct_map

    @property
    def holdings(self) -> dict[str, Any]:
        """As Recording.holdings."""
        return self._survey.holdings

    @property
    def phases(self) -> dict[str, int]:
        """As Recording.phases. Names of marks are those of `marks` in the source that the header tells."""
        return _phases(self)

    def __repr__(self) -> str:
        return f"RecordingFile({self.name!r}, {self.operations} records)"


def _named(source: object) -> dict[int, str]:
    """`marks` of a header's source: names by number; what is none is passed over."""
    named = source.get("marks") if isinstance(source, dict) else None
    pairs = named.items() if isinstance(named, dict) else ()
    return {int(number): str(name) for number, name in pairs if str(number).isdecimal()}


def _phases(recording: Recording | RecordingFile) -> dict[str, int]:
    marks = recording._survey.marks
    found = {} if recording.first_user is None else {"boot": recording.first_user}
    for record, number in marks:
        found.setdefault(recording.marks.get(number, f"mark-{number}"), record)
    return found


def _cuts(kind: NDArray[np.uint8], flags: NDArray[np.uint16], addr: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The places, but for both ends, at which records can be parted."""
    store = kind[1:] == STORE
    # A store belongs to an access before it, and a flagged one to the same frame's before it: to a table's words.
    with_access = kind[:-1] == ACCESS
    same = addr[1:] >> np.uint64(12) == addr[:-1] >> np.uint64(12)
    follows = (flags[1:] & SNAPSHOT != 0) & same
    return np.flatnonzero(~(store & (with_access | follows))) + 1


def open_recording(path: str | os.PathLike[str] | None = None) -> Recording | RecordingFile:
    """A recording to replay (None: the one in the package): one by blocks is not read into memory, others are."""
    return RecordingFile(path) if path is not None and is_recording(path) else load(path)


def bundled() -> AbstractContextManager[Path]:
    """The file of the recording that ships with the package."""
    return importlib.resources.as_file(importlib.resources.files(__package__) / "data" / f"{BUNDLED}{SUFFIX}")


def load(path: str | os.PathLike[str] | None = None) -> Recording:
    """Read a recording (None: the one that ships with the package) and check every record.

    TraceError says what is wrong: the file, the number of the record if it is one, and what was expected.
    """
    if path is None:
        with bundled() as file:
            return load(file)
    if is_recording(path):
        source = RecordingFile(path)
        with source._open() as reader:
            blocks = [block.columns for block in reader]
        return source._piece(0, {name: np.concatenate([block[name] for block in blocks]) for name in _ARRAYS})
    members: dict[str, Any] = read_arrays(path, [name for name in MEMBERS if name not in _OPTIONAL], _OPTIONAL)
    if "complete" in members:
        mark = members["complete"]
        if mark.shape or mark.dtype != np.bool_:
            raise TraceError(
                path, None, f"'complete': one truth value expected, not {mark.dtype} of shape {mark.shape}"
            )
        members["complete"] = bool(mark)
    try:
        return Recording(name=Path(path).stem, **members)
    except TraceError as error:
        raise TraceError(path, error.record, error.expected) from None


def registers(path: str | os.PathLike[str]) -> dict[str, int]:
    """cr0, cr4, efer, nframes and vcpus of a recording of either format. TraceError."""
    if is_recording(path):
        source = RecordingFile(path)
        return {name: getattr(source, name) for name in _SCALARS}
    needed = [name for name in _SCALARS if name not in _OPTIONAL]
    members = {"vcpus": np.uint64(1)} | read_arrays(path, needed, ("vcpus",))
    return {name: _scalar(path, name, members[name]) for name in _SCALARS}


def _scalar(file: object, name: str, value: Any) -> int:
    scalar = np.asarray(value)
    lowest, highest = 1 if name in ("nframes", "vcpus") else 0, _SCALARS[name]
    if scalar.ndim or scalar.dtype.kind not in "iu" or not lowest <= int(scalar) <= highest:
        expected = f"{name!r}: one integer from {lowest} to {highest:#x} expected"
        raise TraceError(file, None, f"{expected}, not {scalar.dtype} of shape {scalar.shape}")
    return int(scalar)
