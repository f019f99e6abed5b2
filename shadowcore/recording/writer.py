"""Writing recordings by blocks. Whatever ends one before its time, the blocks that were written whole are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..config import Features
from ..errors import ConfigError, TraceError
from ..files import Replacement, check_path
from .archive import Archive, Mark
from .format import (
    BLOCK,
    BLOCK_MAX,
    EVENT_DTYPE,
    FORMAT,
    GUEST,
    MACHINE,
    OPERATIONS,
    PROGRAM,
    STREAMS,
    VERSION,
    Event,
)
from .packing import pack, to_npy

if TYPE_CHECKING:
    from types import TracebackType

    from ..engine.machine import VM

_EVENT_MASKS = [(name, (1 << 8 * EVENT_DTYPE[name].itemsize) - 1) for name in EVENT_DTYPE.names or ()]


class Writer:
    """Writes a recording: a context manager, whose end completes the file.

    path: the file. Until it is complete it is named path + ".partial"; an older file is replaced at the end alone.
    stream: "guest", "operations" or "program". name: what reports call it (None: the file's).
    source: plain values that say where the recording comes from.
    guest: cr0, cr4, efer, nframes and vcpus (without it: 1) of a "guest" recording.
    vm: the machine that "operations" start on, as it is now.
    block: records in a block.
    skipped: by whoever writes, what of its input it left out, and how often; the file does not have it.

    Where an exception leaves the context, and where the disk is full, the records that were written are kept in a file
    marked as incomplete; without any record there is no file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
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
        self._good: list[tuple[Mark, int]] = []  # after each block: the archive, and records in it
        self.processes: list[dict[str, Any]] = []
        self.skipped: dict[str, int] = {}
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
            header["guest"]["vcpus"] = int(guest.get("vcpus", 1))
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
            self._archive = Archive(self._file)
            self._archive.add("recording.json", text.encode())
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
                        self._archive.add(f"memory/{n:06}-{len(some)}/{part}.npy", to_npy(array))
                n += 1

    def _mark(self) -> None:
        self._good.append((self._archive.mark(), self.records))

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
                self._archive.add(f"{folder}/{part}.npy", to_npy(array))
                entry["arrays"].append(part)
        if self.stream == PROGRAM:
            rows = self._events
            if not rows or rows[0][:2] != (0, Event.RUN):
                rows = [(0, int(Event.RUN), self._began, 0, 0, 0, 0, 0, 0, 0), *rows]
            events = np.array(rows, dtype=EVENT_DTYPE)
            self._archive.add(f"{folder}/events.npy", to_npy(events))
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
            "checksums": self._archive.checksums,
        }
        self._archive.add("index.json", json.dumps(index).encode())

    def _finish(self, complete: bool) -> None:
        self._archive.close()
        self._file.commit()
        self.closed = True
        self.complete = complete

    def _abandon(self, error: BaseException) -> None:
        """Keep the blocks that were written whole, in a file marked as incomplete, and raise."""
        self.closed = True
        kept = False
        # An archive that is closed, and could not be put in place, cannot be made shorter either.
        while not self._archive.closed and self._good and self._good[-1][1] and not kept:
            mark, self.records = self._good[-1]
            del self._blocks[len(self._good) - 1 :]
            try:
                self._archive.forget(mark)
                self._index_member(False)
                self._archive.check_room()
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
        self._archive.drop()
        self._file.discard()


def _check_machine(vm: VM) -> None:
    """ConfigError for a machine that a header cannot tell: what a replay makes of it would be another one."""
    first, *others = vm.vcpus
    registers = [tuple(getattr(cpu, key) for key in MACHINE) for cpu in (first, *others)]
    if any(found != registers[0] for found in registers):
        raise ConfigError("vm: processors with the same registers are needed; a recording has those of one")
    if vm.features != Features():
        raise ConfigError("vm: a machine with the features of Features() is needed")
    slots = [(slot.gpa, slot.size, slot.read_only) for slot in vm.memory.slots if slot is not None]
    if slots != [(0, vm.memory.bytes.size, False)]:
        raise ConfigError("vm: a machine with one memory slot, at gpa 0, of all its memory, is needed")
