"""The files that recordings lie in: blocks of records, compressed, each with its checksums. docs/recordings.md has all.

Three streams are recorded: what a guest's processor did ("guest", the records of shadowcore.recording), operations for
`cpu.run` ("operations"), and what programs did in their own address spaces ("program"). Files of any length are written
and read by blocks, in bounded memory.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from .. import npy
from .._version import __version__
from ..config import Features
from ..errors import ConfigError, TraceError
from ..files import Replacement, check_path
from . import pages as pages_of

if TYPE_CHECKING:
    from types import TracebackType

    from ..config import Native, Shadow
    from ..engine.machine import VM

    Path_ = str | os.PathLike[str]

__all__ = [
    "BLOCK",
    "BLOCK_MAX",
    "EVENT_DTYPE",
    "FETCH",
    "GUEST",
    "MODIFY",
    "OPERATIONS",
    "PROGRAM",
    "READ",
    "STREAMS",
    "WRITE",
    "Block",
    "Event",
    "Reader",
    "Writer",
    "is_recording",
    "pack",
]

T = TypeVar("T")

FORMAT = "shadowcore recording"
VERSION = 1
SUFFIX = ".screc"
BLOCK = 1 << 18
"""Records in a block, as they are written."""
BLOCK_MAX = 1 << 20
"""Records in a block, as they are read: a limit on memory."""

INCOMPLETE = "The recording is incomplete: it ended before its time"
"""What figures of such a one are shown with."""

_STRIP = 1 << 13

GUEST, OPERATIONS, PROGRAM = "guest", "operations", "program"
"""Streams."""

STREAMS: dict[str, dict[str, str]] = {
    GUEST: {"kind": "u1", "flags": "<u2", "insns": "<u4", "addr": "<u8", "value": "<u8"},
    OPERATIONS: {
        "op": "u1",
        "user": "u1",
        "size": "u1",
        "addr": "<u8",
        "value": "<u8",
        "vcpu": "u1",
        "value_high": "<u8",
        "expected": "<u8",
        "expected_high": "<u8",
    },
    PROGRAM: {"op": "u1", "size": "<u2", "addr": "<u8"},
}
"""Columns of each stream; those of an operation after `value` may be absent."""

MACHINE = ("cr0", "cr4", "efer", "cr3", "pkru", "cr2", "cpl", "ac")
"""Registers at the start of a stream of operations."""


class Event(IntEnum):
    """What a program asked of its kernel, or became: `kind` of an event of a program recording."""

    RUN = 1
    """From here on it is `process` whose accesses follow."""
    EXEC = 2
    """A new program in the address space of `process`, which is emptied. file: its path, where known."""
    CLONE = 3
    """A new process `other`, or with CLONE_VM (0x100) in flags a thread."""
    EXIT = 4
    """The process ends, with status `other`."""
    MMAP = 5
    """[addr, addr + size) is mapped: prot and flags as the kernel takes them; file and offset unless anonymous."""
    MUNMAP = 6
    MPROTECT = 7
    BRK = 8
    """The heap ends at addr; the first of a program says where it begins."""
    MREMAP = 9
    """[other, other + offset) becomes [addr, addr + size)."""
    MADVISE = 10
    """flags: the advice (4: MADV_DONTNEED)."""


READ, WRITE, FETCH, MODIFY = range(4)
"""`op` of an access of a program; MODIFY reads and writes. The first three are those of sc.Op."""

EVENT_DTYPE = np.dtype(
    [
        ("at", "<u4"),
        ("kind", "u1"),
        ("process", "<u4"),
        ("addr", "<u8"),
        ("size", "<u8"),
        ("prot", "<u4"),
        ("flags", "<u8"),
        ("file", "<u4"),
        ("offset", "<u8"),
        ("other", "<u8"),
    ]
)
"""An event. at: number, in its block, of the access that it precedes. file: counts the files of the index from 1."""

_EVENT_MASKS = [(name, (1 << 8 * EVENT_DTYPE[name].itemsize) - 1) for name in EVENT_DTYPE.names or ()]
_MEMBER_MAX = BLOCK_MAX * EVENT_DTYPE.itemsize + (1 << 16)
_JSON_MAX = 1 << 28


Accesses = tuple[int, NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint64]]
"""Accesses of a process that nothing interrupts: (process, op, size, addr)."""


class Block(NamedTuple):
    """Records [first, first + records) of a recording: columns by name, and the events of a program recording."""

    first: int
    records: int
    columns: dict[str, NDArray[Any]]
    events: NDArray[np.void] | None = None

    def segments(self) -> Iterator[NDArray[np.void] | Accesses]:
        """What a program recording holds, in order: an event (an element of EVENT_DTYPE but for RUN), or accesses that
        nothing interrupts, as (process, op, size, addr)."""
        if self.events is None:
            raise ConfigError("block: one of a program recording is needed; others have no events")
        op, size, addr = (self.columns[name] for name in ("op", "size", "addr"))
        ends = np.append(self.events["at"], self.records)[1:].tolist()
        process = 0
        for event, begin, end in zip(self.events, self.events["at"].tolist(), ends, strict=True):
            if event["kind"] == Event.RUN:
                process = int(event["process"])
            else:
                yield event
            if begin < end:
                yield process, op[begin:end], size[begin:end], addr[begin:end]


# -- columns ---------------------------------------------------------------------------------------------


def _narrow(column: NDArray[Any], highest: int) -> NDArray[Any]:
    for code in ("u1", "<u2", "<u4"):
        if highest <= np.iinfo(code).max:
            return column.astype(code)
    return column


def pack(name: str, column: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The arrays that stand for a column in a block, by the name of the member; none for nothing but zeros."""
    if not len(column):
        return {}
    lowest, highest = int(column.min()), int(column.max())
    if lowest == highest:
        return {name: _narrow(column[:1], highest)} if highest else {}
    narrow = _narrow(column, highest)
    if narrow.dtype.itemsize <= 2 or column.dtype.itemsize < 8:
        return {name: narrow}
    wide = np.ascontiguousarray(column, dtype=np.uint64)
    pages = np.empty(min(pages_of.PAGES_MAX, len(wide) // 4), dtype=np.uint64)
    index, offset = np.empty(len(wide), dtype=np.uint16), np.empty(len(wide), dtype=np.uint16)
    used = pages_of.split_pages(wide, pages, index, offset)
    if used < 0:
        return {name: narrow}
    return {
        f"{name}.pages": pages[:used].copy(),
        f"{name}.index": _narrow(index, used - 1),
        f"{name}.offset": _narrow(offset, int(offset.max())),
    }


class _Packed:
    """A column as it stands in a block: a number, an array, or pages with indices and offsets. ValueError if none."""

    def __init__(self, name: str, dtype: np.dtype[Any], records: int, members: Mapping[str, NDArray[Any]]) -> None:
        self.name, self.dtype, self.records = name, dtype, records
        self.plain: NDArray[Any] | None = None
        self.paged: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None
        parts = [members.get(f"{name}.{part}") for part in ("pages", "index", "offset")]
        if parts[0] is not None:
            pages, index, offset = parts
            if index is None or offset is None or dtype.itemsize < 8:
                raise ValueError(f"{name}.pages with {name}.index and {name}.offset, of 64-bit numbers, expected")
            index = np.full(records, index[0]) if len(index) == 1 else index
            offset = np.full(records, offset[0]) if len(offset) == 1 else offset
            if not len(index) == len(offset) == records or index.itemsize > 4 or offset.itemsize > 2:
                raise ValueError(f"{name}.index, {name}.offset: {records} elements expected, of 32 and 16 bits at most")
            self.paged = np.ascontiguousarray(pages, np.uint64), index, offset.astype(np.uint16, copy=False)
            return
        self.plain = members.get(name, np.zeros(1, dtype))
        if len(self.plain) not in (1, records):
            raise ValueError(f"{records} elements, or one, expected in {name}, not {len(self.plain)}")
        if self.plain.itemsize > dtype.itemsize and len(self.plain) and int(self.plain.max()) > np.iinfo(dtype).max:
            raise ValueError(f"{name}: numbers of {8 * dtype.itemsize} bits expected, not {int(self.plain.max()):#x}")

    def fill(self, target: NDArray[Any], begin: int, end: int) -> None:
        """Records [begin, end) into an array of the column's type, which may be a field of another."""
        if self.paged is None:
            assert self.plain is not None
            target[:] = self.plain[0] if len(self.plain) == 1 != self.records else self.plain[begin:end]
            return
        pages, index, offset = self.paged
        done = pages_of.join_pages(pages, index[begin:end], offset[begin:end], target)
        if done < end - begin:
            number = int(index[begin + done])
            raise ValueError(f"record {begin + done} of the block: a page of {self.name}.pages expected, not {number}")

    def decode(self) -> NDArray[Any]:
        if self.plain is not None and len(self.plain) == self.records:
            return self.plain.astype(self.dtype, copy=False)
        array = np.empty(self.records, self.dtype)
        self.fill(array, 0, self.records)
        return array


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    npy_format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _from_npy(data: bytes) -> NDArray[Any]:
    """An array of one dimension in the .npy format 1.0; ValueError otherwise."""
    array = npy.parse(data)
    if data[6:8] != b"\1\0":
        raise ValueError("version 1.0 of the .npy format expected")
    if array.ndim != 1:
        raise ValueError("one dimension of plain numbers expected")
    return array


# -- writing ---------------------------------------------------------------------------------------------


class Writer:
    """Writes a recording: a context manager, whose end completes the file.

    path: the file. Until it is complete it is named path + ".partial"; an older file is replaced at the end alone.
    stream: "guest", "operations" or "program". name: what reports call it (None: the file's).
    source: plain values that say where the recording comes from.
    guest: cr0, cr4, efer and nframes of a "guest" recording. vm: the machine that "operations" start on, as it is now.
    block: records in a block.

    Where an exception leaves the context, and where the disk is full, the records that were written are kept in a file
    marked as incomplete; without any record there is no file.
    """

    def __init__(
        self,
        path: Path_,
        stream: str,
        *,
        name: str | None = None,
        source: Mapping[str, Any] | None = None,
        guest: Mapping[str, int] | None = None,
        vm: VM | None = None,
        block: int = BLOCK,
    ) -> None:
        if stream not in STREAMS:
            raise ConfigError(f"stream: one of {', '.join(STREAMS)} is needed, not {stream!r}")
        if not isinstance(block, int) or not 1 <= block <= BLOCK_MAX:
            raise ConfigError(f"block: 1 to {BLOCK_MAX} records, not {block!r}")
        if (stream == GUEST) != (guest is not None):
            raise ConfigError(f"guest: registers and memory are needed for the stream {GUEST!r}, and for it alone")
        if vm is not None:
            if stream != OPERATIONS:
                raise ConfigError(f"vm: a machine is for the stream {OPERATIONS!r}")
            _check_machine(vm)
        self.path = Path(check_path(path))
        self.stream = stream
        self.records = 0
        self.complete = False
        self.closed = False
        self._failed: TraceError | None = None  # why there is no more room: what is written afterwards fails by it too
        self._block = block
        self._dtypes = {column: np.dtype(code) for column, code in STREAMS[stream].items()}
        self._pending: dict[str, list[NDArray[Any]]] = {column: [] for column in self._dtypes}
        self._waiting = 0
        self._events: list[tuple[int, ...]] = []
        self._process = self._began = 0  # the process that runs, now and where the block begins
        self._files: dict[str, int] = {}
        self._blocks: list[dict[str, Any]] = []
        self._words: list[int] = []  # of memory at the start, in each part
        self._good: list[tuple[int, int, int]] = []  # after each block: offset, members, records
        self.processes: list[dict[str, Any]] = []
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "stream": stream,
            "name": self.path.stem if name is None else name,
            "created_by": f"shadowcore {__version__}",
            "source": dict(source or {}),
        }
        if guest is not None:
            header["guest"] = {key: int(guest[key]) for key in ("cr0", "cr4", "efer", "nframes")}
        if vm is not None:
            cpu = vm.vcpus[0]
            header["machine"] = {key: int(getattr(cpu, key)) for key in MACHINE}
            header["machine"] |= {"memory": len(vm.memory.bytes), "vcpus": len(vm.vcpus)}
        text = json.dumps(header, indent=1)
        try:
            self._file = Replacement(path, fixed=True)
        except OSError as error:
            raise TraceError(path, None, f"a file that can be written expected: {error.strerror}") from None
        try:
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED)
            self._member("recording.json", text.encode())
            if vm is not None:
                self._memory(vm.memory.words)
            self._mark()
        except BaseException as error:
            self._abandon(error)

    def _memory(self, words: NDArray[np.uint64]) -> None:
        """Words that are not zero, by their numbers."""
        n = 0
        for first in range(0, len(words), 1 << 24):
            used = np.flatnonzero(words[first : first + (1 << 24)])
            for begin in range(0, len(used), BLOCK):
                some = used[begin : begin + BLOCK]
                self._words.append(len(some))
                columns = {"word": some.astype(np.uint64) + np.uint64(first), "value": words[first:][some]}
                for name, column in columns.items():
                    for part, array in pack(name, column).items():
                        self._member(f"memory/{n:06}-{len(some)}/{part}.npy", _npy(array))
                n += 1

    def _member(self, name: str, data: bytes) -> None:
        # A sample of the middle tells whether deflating gains anything, and whether trying harder does: what shrinks
        # little takes long, up to ten times as long, for being smaller by a tenth.
        middle = data[len(data) // 2 :][: 1 << 14]
        ratio = len(zlib.compress(middle, 1)) / max(len(middle), 1)
        method = zipfile.ZIP_DEFLATED if ratio < 0.9 else zipfile.ZIP_STORED
        # A date of its own would make two recordings of the same records differ.
        info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        self._zip.writestr(info, data, method, 6 if ratio < 0.2 else 4 if ratio < 0.6 else 1)

    def _mark(self) -> None:
        self._good.append((self._zip.start_dir, len(self._zip.filelist), self.records))

    def write(self, records: NDArray[np.void] | None = None, **columns: Any) -> None:
        """Append records: a structured array with fields named as the columns, or an array a column (or one number for
        all records). Columns that are not named are 0. They are copied."""
        self._check_open()
        if records is not None:
            if records.dtype.names is None or columns:
                raise ConfigError("records: a structured array, or a column by each keyword, is needed")
            columns = {name: records[name] for name in records.dtype.names}
        if not columns.keys() <= self._dtypes.keys():
            raise ConfigError(f"columns: {self.stream!r} has {', '.join(self._dtypes)}, not {', '.join(columns)}")
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        lengths = {len(array) for array in arrays.values() if array.ndim == 1}
        length = max(lengths, default=0)
        if len(lengths) != 1 or any(array.ndim > 1 or array.dtype.kind not in "ui" for array in arrays.values()):
            raise ConfigError("columns: arrays of unsigned integers, of one dimension and one length, are needed")
        for name, array in arrays.items():
            limit = int(np.iinfo(self._dtypes[name]).max)
            if array.size and (int(array.min()) < 0 or int(array.max()) > limit):
                raise ConfigError(f"{name}: numbers from 0 to {limit:#x} are needed")
        done = 0
        while done < length:
            part = min(length - done, self._block - self._waiting)
            for name, dtype in self._dtypes.items():
                array = arrays.get(name, np.zeros((), dtype=dtype))
                piece = np.empty(part, dtype=dtype)
                piece[:] = array[done : done + part] if array.ndim else array
                self._pending[name].append(piece)
            done += part
            self._waiting += part
            if self._waiting == self._block:
                self.flush()

    def event(self, kind: int, process: int, file: str | None = None, **fields: int) -> None:
        """Append an event of a program recording: what comes next comes after it."""
        self._check_open()
        if self.stream != PROGRAM:
            raise ConfigError(f"event: the stream {PROGRAM!r} has events, not {self.stream!r}")
        if kind == Event.RUN:
            self._process = process
        row = dict.fromkeys(EVENT_DTYPE.names or (), 0) | fields
        row |= {"at": self._waiting, "kind": int(kind), "process": process}
        if file is not None:
            row["file"] = self._files.setdefault(file, len(self._files) + 1)
        self._events.append(tuple(row[name] & mask for name, mask in _EVENT_MASKS))
        if len(self._events) >= self._block:
            self.flush()

    def flush(self) -> None:
        """Write what was appended as a block; if the disk is full, TraceError, and the file has the blocks before."""
        self._check_open()
        if not self._waiting and not self._events:
            return
        try:
            self._write_block()
        except BaseException as error:
            self._abandon(error)

    def _write_block(self) -> None:
        columns = {}
        for name, pieces in self._pending.items():
            columns[name] = np.concatenate(pieces) if pieces else np.zeros(0, self._dtypes[name])
        folder = f"blocks/{len(self._blocks):06}-{self._waiting}"
        entry: dict[str, Any] = {"records": self._waiting, "arrays": []}
        for name, column in columns.items():
            packed = pack(name, column)
            if not packed and name == next(iter(columns)):
                packed = {name: column[:1]}  # so that the block has a member
            for part, array in packed.items():
                self._member(f"{folder}/{part}.npy", _npy(array))
                entry["arrays"].append(part)
        if self.stream == PROGRAM:
            rows = self._events
            if not rows or rows[0][:2] != (0, Event.RUN):
                rows = [(0, int(Event.RUN), self._began, 0, 0, 0, 0, 0, 0, 0), *rows]
            events = np.array(rows, dtype=EVENT_DTYPE)
            self._member(f"{folder}/events.npy", _npy(events))
            entry["arrays"].append("events")
            entry["processes"] = np.unique(events["process"]).tolist()
            entry["events"] = len(events)
        self.records += self._waiting
        self._blocks.append(entry)
        self._mark()
        for pieces in self._pending.values():
            pieces.clear()
        self._events.clear()
        self._waiting = 0
        self._began = self._process

    def _check_open(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self.closed:
            raise ConfigError(f"{self.path}: the recording is closed")

    def close(self, complete: bool = True) -> None:
        """Write what was appended, and the index; complete=False marks the recording as incomplete."""
        if self.closed:
            return
        self.flush()
        try:
            self._index_member(complete)
            self._finish(complete)
        except BaseException as error:
            self._abandon(error)

    def _index_member(self, complete: bool) -> None:
        index = {
            "complete": complete,
            "records": self.records,
            "blocks": self._blocks,
            "files": list(self._files),
            "processes": self.processes,
            "memory": self._words,
            "checksums": {info.filename: info.CRC for info in self._zip.filelist},
        }
        self._member("index.json", json.dumps(index).encode())

    def _finish(self, complete: bool) -> None:
        self._zip.close()
        self._file.commit()
        self.closed = True
        self.complete = complete

    def _abandon(self, error: BaseException) -> None:
        """Keep the blocks that were written whole, in a file marked as incomplete, and raise."""
        self.closed = True
        kept = False
        # An archive that is closed, and could not be put in place, cannot be made shorter either.
        while self._zip.fp is not None and self._good and self._good[-1][2] and not kept:
            offset, members, self.records = self._good[-1]
            del self._blocks[len(self._good) - 1 :]
            # The archive as it was then: the members after it are forgotten, the index comes in their place.
            del self._zip.filelist[members:]
            self._zip.NameToInfo = {info.filename: info for info in self._zip.filelist}
            self._zip.start_dir = offset
            try:
                self._file.truncate(offset)
                self._file.seek(offset)
                self._index_member(False)
                # The archive's own index must find room as well, for it is closed but once.
                end = self._file.seek(0, 2)
                self._file.write(bytes(sum(len(info.filename) + 100 for info in self._zip.filelist) + 200))
                self._file.truncate(end)
                self._file.seek(end)
                self._finish(False)
                kept = True
            except OSError:
                self._good.pop()  # not even room for the index: the last block makes way for it
        if not kept:
            self._discard()
        if isinstance(error, OSError):
            what = f"{self.records:,} records are kept, marked as incomplete" if kept else "nothing is kept"
            expected = f"room for the recording expected: {error.strerror or error}; {what}"
            self._failed = TraceError(self.path, self.records + self._waiting, expected)
            raise self._failed from None
        raise error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.closed:
            return
        if error is None:
            self.close()
        elif self.records or self._waiting or self._events:
            self.close(complete=False)
        else:
            self.closed = True
            self._discard()

    def _discard(self) -> None:
        self.records = 0
        self._zip.fp = None  # the archive is closed without an index of its own
        self._file.discard()


def _check_machine(vm: VM) -> None:
    """ConfigError for a machine that a header cannot tell: what `Reader.machine` makes of it would be another one."""
    first, *others = vm.vcpus
    registers = [tuple(getattr(cpu, key) for key in MACHINE) for cpu in (first, *others)]
    if any(found != registers[0] for found in registers):
        raise ConfigError("vm: processors with the same registers are needed; a recording has those of one")
    if vm.features != Features():
        raise ConfigError("vm: a machine with the features of Features() is needed")
    if len(vm.memory.slots) != 1 or vm.memory.slots[0].gpa:
        raise ConfigError("vm: a machine with one memory slot, at gpa 0, is needed")


# -- reading ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Member:
    info: zipfile.ZipInfo
    name: str


class Reader:
    """Reads a recording by blocks: a context manager. TraceError says what is wrong, and in which record.

    header: the file's header. stream, name, source: from it.
    records: how many there are. complete: whether the recording was ended as it should; if not, its blocks are good.
    files, processes: of a program recording.
    ahead: blocks that are decoded, each in a thread of its own, while one is used (None: as there are processors).
    """

    def __init__(self, path: Path_, *, ahead: int | None = None) -> None:
        self.path = Path(check_path(path))
        self._sums: dict[str, dict[str, Any]] | None = None  # by folder, then by name: checksums of the index
        self._ahead = min(max(_processors() - 1, 1), 3) if ahead is None else ahead
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise TraceError(path, None, f"a readable recording expected: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self._file)
            npy.check_members(self._zip)
        except npy.UNREADABLE as error:
            expected = f"a recording expected: this is none, or it is cut short ({error})"
            raise TraceError(self.path, None, expected) from None
        self.header = self._json("recording.json")
        if self.header.get("format") != FORMAT:
            raise TraceError(self.path, None, f"a recording expected: recording.json names no {FORMAT!r}")
        if self.header.get("version") != VERSION:
            raise TraceError(self.path, None, f"version {VERSION} expected, not {self.header.get('version')!r}")
        self.stream = self.header.get("stream")
        if self.stream not in STREAMS:
            raise TraceError(self.path, None, f"a stream of {', '.join(STREAMS)} expected, not {self.stream!r}")
        self.name = str(self.header.get("name", self.path.stem))
        self.source = self.header.get("source", {})
        self._dtypes = {column: np.dtype(code) for column, code in STREAMS[self.stream].items()}
        self._members, self._counts = self._folders("blocks")
        self._starts = [0]
        for count in self._counts:
            self._starts.append(self._starts[-1] + count)
        self.records = self._starts[-1]
        index = self._json("index.json")
        self.complete = index.get("complete") is True
        self.files: list[str] = [str(file) for file in _list(index, "files")]
        self.processes: list[dict[str, Any]] = [entry for entry in _list(index, "processes") if isinstance(entry, dict)]
        self._index = [entry for entry in _list(index, "blocks") if isinstance(entry, dict)]
        if [entry.get("records") for entry in self._index] != self._counts:
            expected = f"{len(self._index)} blocks of {index.get('records')} records expected, as the index says"
            raise TraceError(self.path, self.records, f"{expected}, not {len(self._counts)} of {self.records}")
        for number, (entry, members) in enumerate(zip(self._index, self._members, strict=True)):
            names = sorted(member.name for member in members)
            if sorted(map(str, _list(entry, "arrays"))) != names:
                expected = f"block {number}: arrays {_list(entry, 'arrays')} expected, as the index says, not {names}"
                raise TraceError(self.path, self._starts[number], expected)
        if self.stream == GUEST:
            self.guest = {key: self._number("guest", key) for key in ("cr0", "cr4", "efer", "nframes")}
        self._check_members(index)

    def _check_members(self, index: Mapping[str, Any]) -> None:
        """The members that the index names are there, and no others: those of blocks are looked at with their block.

        Recordings made before there were checksums in the index have what `_open` compares, and no more.
        """
        sums = index.get("checksums")
        if sums is None:
            return
        if not isinstance(sums, dict):
            raise TraceError(self.path, None, "index.json: an object expected as checksums")
        self._sums = {}
        for name, checksum in sums.items():
            self._sums.setdefault(name.rpartition("/")[0], {})[name] = checksum
        there = {info.filename for info in self._zip.filelist}
        folders = {member.info.filename.rpartition("/")[0] for block in self._members for member in block}
        for name in sorted(there ^ {*sums, "index.json"}):
            if name.rpartition("/")[0] not in folders:
                raise self._unlike(name, name in there, None)
        if index.get("records") != self.records or index.get("memory", []) != self._folders("memory")[1]:
            raise TraceError(self.path, None, "records and words of memory as many as the index says expected")
        self._check_sums([self._zip.getinfo("recording.json")], None)

    def _check_sums(self, members: Iterable[zipfile.ZipInfo], record: int | None) -> None:
        """The members of a folder are those that the index was made for, and not another recording's or block's. Zip
        checks the contents of each against the checksum that is compared here."""
        if self._sums is None:
            return
        found = {info.filename: info.CRC for info in members}
        expected = self._sums.get(next(iter(found), "").rpartition("/")[0], {})
        for name in sorted({*found, *expected} - {"index.json"}):
            if found.get(name) != expected.get(name):
                raise self._unlike(name, name in found, record)

    def _unlike(self, name: str, there: bool, record: int | None) -> TraceError:
        state = "another, or one that is not in it" if there else "it is lost"
        return TraceError(self.path, record, f"{name}: the member that the index was made for expected: {state}")

    def _number(self, group: str, key: str) -> int:
        value = (self.header.get(group) or {}).get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            raise TraceError(self.path, None, f"recording.json: a 64-bit number {group}.{key} expected, not {value!r}")
        return value

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(self._zip.getinfo(name), _JSON_MAX))
        except (*npy.UNREADABLE, RecursionError) as error:
            raise TraceError(self.path, None, f"a member {name} expected: {error}") from None
        if not isinstance(value, dict):
            raise TraceError(self.path, None, f"an object in {name} expected")
        return value

    def _folders(self, root: str) -> tuple[list[list[_Member]], list[int]]:
        """Members and numbers of records of ROOT/NUMBER-RECORDS/NAME.npy, by number."""
        found: dict[int, tuple[int, list[_Member]]] = {}
        for info in self._zip.filelist:
            parts = info.filename.split("/")
            if len(parts) != 3 or parts[0] != root or not parts[2].endswith(".npy"):
                continue
            number, _, records = parts[1].partition("-")
            if not (number.isdecimal() and records.isdecimal() and len(records) < 9) or int(records) > BLOCK_MAX:
                expected = f"a folder {root}/NUMBER-RECORDS of {BLOCK_MAX} records at most expected, not {parts[1]!r}"
                raise TraceError(self.path, None, expected)
            count, members = found.setdefault(int(number), (int(records), []))
            if count != int(records):
                raise TraceError(self.path, None, f"one number of records for block {int(number)} expected")
            members.append(_Member(info, parts[2].removesuffix(".npy")))
        numbers = sorted(found)
        if numbers != list(range(len(numbers))):
            missing = next(n for n in range(len(numbers)) if n not in found)
            raise TraceError(self.path, None, f"{root}: block {missing} expected, there is none")
        return [found[n][1] for n in numbers], [found[n][0] for n in numbers]

    def _read(self, info: zipfile.ZipInfo, highest: int = _MEMBER_MAX) -> bytes:
        """The bytes of a member, whose checksum agrees."""
        if info.file_size > highest:
            raise ValueError(f"{highest} bytes at most expected in {info.filename}, not {info.file_size}")
        return self._zip.read(info)

    def __len__(self) -> int:
        return self.records

    @property
    def block_count(self) -> int:
        """Number of blocks, each decoded and checked by itself."""
        return len(self._counts)

    def block(self, number: int) -> Block:
        """Block `number`, decoded and checked."""
        first, records, arrays = self._load(number)
        columns = self._columns(arrays, self._dtypes, records, first)
        events = arrays.get("events") if self.stream == PROGRAM else None
        if self.stream == PROGRAM:
            self._check_program(columns, events, first, records)
        self._check_sums((member.info for member in self._members[number]), first)
        return Block(first, records, columns, events)

    def _load(self, number: int) -> tuple[int, int, dict[str, NDArray[Any]]]:
        """First record, number of records, and arrays of a block as they stand in it."""
        if not 0 <= number < len(self._counts):
            raise ConfigError(f"number: a block from 0 to {len(self._counts) - 1}, not {number!r}")
        first = self._starts[number]
        return first, self._counts[number], self._arrays(self._members[number], first, f"block {number}")

    def _operations(self, number: int) -> NDArray[np.void]:
        first, records, arrays = self._load(number)
        present = {member.partition(".")[0] for member in arrays}
        names = [name for n, name in enumerate(self._dtypes) if n < 5 or name in present]
        array = np.empty(records, np.dtype([(name, self._dtypes[name]) for name in names], align=True))
        try:
            packed = [_Packed(name, self._dtypes[name], records, arrays) for name in names]
            # Few at a time, so that what one column leaves in the cache the next finds there.
            for begin in range(0, records, _STRIP):
                end = min(begin + _STRIP, records)
                for column in packed:
                    column.fill(array[column.name][begin:end], begin, end)
        except ValueError as error:
            raise TraceError(self.path, first, str(error)) from None
        self._check_sums((member.info for member in self._members[number]), first)
        return array

    def _arrays(self, members: Sequence[_Member], first: int, where: str) -> dict[str, NDArray[Any]]:
        arrays = {}
        for member in members:
            try:
                array = _from_npy(self._read(member.info))
                if member.name != "events" and array.dtype.kind != "u":
                    raise ValueError(f"unsigned integers expected, not {array.dtype}")
                if array.dtype.byteorder == ">":
                    array = array.astype(array.dtype.newbyteorder("<"))
            except npy.UNREADABLE as error:
                expected = f"{where}, a readable {member.name}.npy expected: {error}"
                raise TraceError(self.path, first, expected) from None
            arrays[member.name] = array
        return arrays

    def _columns(
        self, arrays: Mapping[str, NDArray[Any]], dtypes: Mapping[str, np.dtype[Any]], records: int, first: int
    ) -> dict[str, NDArray[Any]]:
        try:
            return {name: _Packed(name, dtype, records, arrays).decode() for name, dtype in dtypes.items()}
        except ValueError as error:
            raise TraceError(self.path, first, str(error)) from None

    def _check_program(
        self, columns: dict[str, NDArray[Any]], events: NDArray[Any] | None, first: int, records: int
    ) -> None:
        if events is None or events.dtype != EVENT_DTYPE or not len(events):
            raise TraceError(self.path, first, "events of a program expected, RUN at the beginning of every block")
        at = events["at"].astype(np.int64)
        if events["kind"][0] != Event.RUN or at[0] or (np.diff(at) < 0).any() or at[-1] > records:
            expected = f"events in order expected, from RUN before record 0 to {records} at most"
            raise TraceError(self.path, first, expected)
        bad = np.flatnonzero((events["kind"] < min(Event)) | (events["kind"] > max(Event)))
        if len(bad):
            expected = f"an event from 1 to {max(Event)} expected, not {events['kind'][bad[0]]}"
            raise TraceError(self.path, first + int(at[bad[0]]), expected)
        wrong = columns["op"] > MODIFY
        if wrong.any():
            at_fault = int(wrong.argmax())
            expected = f"an op from 0 to {MODIFY} expected, not {columns['op'][at_fault]}"
            raise TraceError(self.path, first + at_fault, expected)

    def blocks(self, first: int = 0, process: int | None = None) -> Iterator[Block]:
        """The blocks in order, from the one with record `first` on; of a program recording, those with `process`."""
        numbers = [n for n in range(len(self._counts)) if self._starts[n + 1] > first or not self._counts[n]]
        if process is not None:
            numbers = [n for n in numbers if process in _list(self._index[n], "processes")]
        return self._in_order(self.block, numbers)

    def process(self, number: int) -> Iterator[NDArray[np.void] | Accesses]:
        """What one process of a program recording did, in order: see Block.segments."""
        for block in self.blocks(process=number):
            for part in block.segments():
                if (part[0] if isinstance(part, tuple) else part["process"]) == number:
                    yield part

    def operations(self, first: int = 0) -> Iterator[NDArray[np.void]]:
        """A recording of operations as arrays for `cpu.run`, a block each, from the one with record `first` on."""
        if self.stream != OPERATIONS:
            raise TraceError(self.path, None, f"a recording of operations expected, not of a {self.stream}")
        return self._in_order(self._operations, [n for n in range(len(self._counts)) if self._starts[n + 1] > first])

    def _in_order(self, function: Callable[[int], T], numbers: list[int]) -> Iterator[T]:
        if self._ahead < 1 or len(numbers) < 2:
            yield from map(function, numbers)
            return
        with ThreadPoolExecutor(self._ahead, "shadowcore-read") as pool:
            coming: deque[Future[T]] = deque()
            try:
                for number in numbers:
                    coming.append(pool.submit(function, number))
                    if len(coming) > self._ahead:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()

    def __iter__(self) -> Iterator[Block]:
        return self.blocks()

    def memory(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        """Memory at the start of a recording of operations, in parts: numbers (gpa / 8) of words, and their values. All
        others are 0."""
        if self.stream != OPERATIONS or "machine" not in self.header:
            raise TraceError(self.path, None, "a recording of operations with the machine that they start on expected")
        size = self._number("machine", "memory")
        dtypes = {"word": np.dtype("<u8"), "value": np.dtype("<u8")}
        members, counts = self._folders("memory")
        for number, count in enumerate(counts):
            columns = self._columns(self._arrays(members[number], 0, f"memory {number}"), dtypes, count, 0)
            if count and int(columns["word"].max()) >= size >> 3:
                raise TraceError(self.path, None, f"words of {size:#x} bytes of memory expected")
            self._check_sums((member.info for member in members[number]), None)
            yield columns["word"], columns["value"]

    def machine(self, mmu: str | Native | Shadow = "cached") -> VM:
        """The virtual machine that a recording of operations starts on, under a design."""
        from ..config import design
        from ..engine.machine import VM, set_registers
        from ..errors import GeneralProtection

        if self.stream != OPERATIONS or "machine" not in self.header:
            raise TraceError(self.path, None, "a recording of operations with the machine that they start on expected")
        state = {key: self._number("machine", key) for key in (*MACHINE, "memory", "vcpus")}
        made = design(mmu)
        try:
            vm = VM(memory=state["memory"], mmu=made, vcpus=state["vcpus"])
        except ConfigError as error:
            raise TraceError(self.path, None, f"a machine that can be expected: {error}") from None
        for words, values in self.memory():
            vm.memory.words[words] = values
        for cpu in vm.vcpus:
            try:
                set_registers(vm, cpu, **{name: state[name] for name in ("cr0", "cr3", "cr4", "efer")})
                cpu.pkru, cpu.cr2, cpu.cpl, cpu.ac = state["pkru"], state["cr2"], state["cpl"], bool(state["ac"])
            except GeneralProtection:
                raise TraceError(self.path, None, "registers that a processor can have expected") from None
        vm.stats.reset()
        return vm

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        return f"Reader({self.name!r}, {self.stream}, {self.records} records in {self.block_count} blocks{state})"


def _list(index: Mapping[str, Any], key: str) -> list[Any]:
    value = index.get(key, [])
    return value if isinstance(value, list) else []


def is_recording(path: Path_) -> bool:
    """Whether the file looks like one of this format: a zip whose first member is recording.json."""
    try:
        with open(check_path(path), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return False
            return file.read(44)[30:] == b"recording.json"
    except OSError:
        return False


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
