"""Traces of DynamoRIO's drmemtrace (.zip, .gz), the threads of a process in one file or in several."""

from __future__ import annotations

import heapq
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import npy
from ...errors import TraceError
from ..format import CLONE_VM, FETCH, READ, WRITE, Event
from ..writer import Writer
from .processes import Processes
from .source import CHUNK, Pipe, Progress, Source

_ZIPPED = re.compile(rb"PK\x03\x04.{22}.{4}chunk\.\d", re.S)
_LAYOUTS = tuple(np.dtype([("type", "<u2"), ("size", "<u2"), ("addr", code)]) for code in ("<u8", "<u4"))
"""An entry, of 64-bit programs and of 32-bit ones. size: of an access; of a marker, which it is."""

# Types of entries, and of markers, by their numbers in drmemtrace.
_INSTRUCTIONS = (*range(10, 17), 30, 31, 48, 49)
_BUNDLE, _FLUSHES, _THREAD, _THREAD_EXIT, _PID, _HEADER, _FOOTER, _MARKER = 17, range(18, 22), 22, 23, 24, 25, 26, 28
_PREFETCHES = (*range(2, 10), 27, *range(32, 47))
_NO_FETCH, _ENCODING = 29, 47
_TYPES = 50
_TIMESTAMP, _BEGINS, _ENDS = 2, 27, 28  # the kernel's part of a system call begins, ends

HEAD_MIN = 1 << 11
"""Bytes of a trace in which its threads are looked for before it is read."""
CHUNK_MIN = 1 << 16
_NONE = 255
_OPS = np.full(_TYPES, _NONE, dtype=np.uint8)
_OPS[[*_INSTRUCTIONS]] = FETCH
_OPS[[0, 1]] = READ, WRITE
_STOPS = np.zeros(_TYPES, dtype=bool)
_STOPS[[_THREAD, _THREAD_EXIT, _PID]] = True
KERNEL, PREFETCHES, FLUSHES = "accesses of the kernel", "prefetches", "cache flushes"
"""What is skipped, as it is counted: the kernel here is one of our own, and the others fault in no page."""


def matches(head: bytes) -> bool:
    """An archive of chunks, or entries that begin with a header."""
    return _ZIPPED.match(head) is not None or _layout(head) is not None


def _layout(head: bytes) -> np.dtype[Any] | None:
    """Of a trace that begins so: a header with the version, then what the trace, or the thread, is."""
    for dtype in _LAYOUTS:
        if len(head) < 2 * dtype.itemsize:
            continue
        (what, size, version), (then, _, _) = np.frombuffer(head, dtype, 2).tolist()
        if (what, size) == (_HEADER, 0) and 1 <= version <= 64 and then in (_MARKER, _THREAD):
            return dtype
    return None


@dataclass(frozen=True)
class _Part:
    """Accesses of a thread that nothing interrupts; ended: the thread is gone after them."""

    time: int
    file: int
    tid: int
    pid: int | None
    op: NDArray[np.uint8]
    size: NDArray[np.uint16]
    addr: NDArray[np.uint64]
    ended: bool = False


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """Fetches, reads and writes. Several files, a thread each, are put in the order of their time stamps.

    Threads of one process are one process of the recording. What the kernel did in traces that have it is skipped and
    counted. An access of size 0 is of one byte. TraceError too where a trace ends before its footer.
    """
    total = sum(0 if isinstance(path, Pipe) else os.stat(path).st_size for path in paths if os.path.exists(path))
    traces = [_Trace(path, number, writer, max(CHUNK // len(paths), CHUNK_MIN)) for number, path in enumerate(paths)]
    processes = Processes(writer)
    threads: dict[int | None, set[int]] = {}  # that are known, by process
    for trace in traces:
        for tid, pid in trace.known:
            threads.setdefault(pid, set()).add(tid)
    met: dict[int | None, set[int]] = {}
    for part in heapq.merge(*traces, key=lambda part: (part.time, part.file)):
        number = processes.by_pid.get(part.pid) if part.pid is not None else None
        if part.pid is None and met.get(None):
            number = processes.running
        if number is None:
            number = processes.new(part.pid, text=traces[part.file].path)
            met[part.pid] = set()
        processes.run(number)
        if part.tid not in met[part.pid]:
            if met[part.pid]:
                writer.event(Event.CLONE, number, other=number, flags=CLONE_VM)
            met[part.pid].add(part.tid)
        if len(part.op):
            writer.write(op=part.op, size=part.size, addr=part.addr)
        if part.ended:
            left = threads.setdefault(part.pid, set())
            left.discard(part.tid)
            if not left:
                writer.event(Event.EXIT, number)
                processes.by_pid.pop(part.pid or 0, None)
        if progress is not None:
            progress(sum(trace.done for trace in traces), total)


class _Trace:
    """A file, by the parts of its threads."""

    def __init__(self, path: str | os.PathLike[str], number: int, writer: Writer, chunk: int) -> None:
        self.done = 0
        self.path = os.fspath(path)
        self._number, self._skipped, self._chunk = number, writer.skipped, chunk
        self._tid, self._time, self._depth = 0, 0, 0
        self._pid: int | None = None
        self._pids: dict[int, int] = {}
        self._bytes = self._unpacked(path)
        self._head = b""
        while len(self._head) < HEAD_MIN and (more := next(self._bytes, b"")):
            self._head += more
        self._dtype = _layout(self._head)
        if self._dtype is None:
            raise TraceError(self.path, 0, "the header of a trace of drmemtrace expected")
        rows = np.frombuffer(self._head, self._dtype, min(len(self._head) // self._dtype.itemsize, 64))
        self.known = _threads(rows)

    def _unpacked(self, path: str | os.PathLike[str]) -> Iterator[bytes]:
        with Source(path, keep=isinstance(path, Pipe)) as source:
            zipped = source.read(4) == b"PK\x03\x04"
        if not zipped:
            with Source(path, self._told) as source:
                while data := source.read(self._chunk):
                    yield data
            return
        if isinstance(path, Pipe):
            raise TraceError(self.path, None, "a file expected, not a pipe: a .zip is read from its end")
        try:
            with zipfile.ZipFile(path) as archive:
                npy.check_members(archive)
                for info in archive.infolist():
                    with archive.open(info) as member:
                        while data := member.read(self._chunk):
                            yield data
                    self.done += info.compress_size
        except npy.UNREADABLE as error:
            raise TraceError(self.path, None, f"a whole archive of chunks expected: {error}") from None

    def _told(self, done: int, total: int) -> None:
        self.done = done  # bytes of the file, which may be compressed

    def __iter__(self) -> Iterator[_Part]:
        dtype = self._dtype
        assert dtype is not None
        first, rest, footer = 0, b"", False
        data: bytes | None = self._head
        while data is not None:
            data = rest + data
            whole = len(data) // dtype.itemsize
            rest = data[whole * dtype.itemsize :]
            rows = np.frombuffer(data, dtype, whole)
            bad = np.flatnonzero((rows["type"] >= _TYPES) | (rows["type"] == _BUNDLE))
            good = rows[: bad[0]] if len(bad) else rows
            yield from self._parts(good)
            if len(bad):
                found = int(rows["type"][bad[0]])
                what = "a bundle of instructions, as online traces have: drrun -t drmemtrace -offline makes the others"
                expected = what if found == _BUNDLE else f"{found}"
                raise TraceError(self.path, first + int(bad[0]), f"an entry of a known type expected, not {expected}")
            footer = bool(len(rows) and rows["type"][-1] == _FOOTER) or (footer and not whole)
            first += whole
            data = next(self._bytes, None)
        if rest or not footer:
            what = f"the trace ends after {len(rest)} bytes of an entry" if rest else "the trace ends without it"
            raise TraceError(self.path, first, f"the footer of a whole trace expected: {what}")

    def _parts(self, rows: Any) -> Iterator[_Part]:
        types = rows["type"]
        marks = types == _MARKER
        stamps = marks & (rows["size"] == _TIMESTAMP)
        kernel = self._kernel(rows, marks)
        op = _OPS[types]
        known = op != _NONE
        addr = rows["addr"].astype(np.uint64)
        known &= ~kernel & (addr >> np.uint64(63) == 0)
        self._count(KERNEL, int(np.count_nonzero(op != _NONE)) - int(np.count_nonzero(known)))
        self._count(PREFETCHES, int(np.isin(types, _PREFETCHES).sum()))
        self._count(FLUSHES, int(np.isin(types, _FLUSHES).sum()))
        size = np.maximum(rows["size"], 1)
        at = 0
        for stop in [*np.flatnonzero(_STOPS[types] | stamps).tolist(), len(rows)]:
            there = known[at:stop]
            ended = stop < len(rows) and types[stop] == _THREAD_EXIT
            if there.any() or ended:
                columns = (op[at:stop][there], size[at:stop][there], addr[at:stop][there])
                yield _Part(self._time, self._number, self._tid, self._pid, *columns, ended=ended)
            if stop < len(rows):
                self._stop(int(types[stop]), int(addr[stop]))
            at = stop + 1

    def _stop(self, what: int, value: int) -> None:
        if what == _MARKER:
            self._time = value
        elif what == _THREAD:
            self._tid = value
            self._pid = self._pids.get(value, self._pid)
        elif what == _PID:
            self._pid = self._pids[self._tid] = value

    def _kernel(self, rows: Any, marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """For each row, whether it is between marks of the kernel's own work."""
        found = np.zeros(len(rows), dtype=bool)
        begin = 0 if self._depth else None
        for row in np.flatnonzero(marks & np.isin(rows["size"], (_BEGINS, _ENDS))).tolist():
            if rows["size"][row] == _BEGINS:
                begin = row if self._depth == 0 else begin
                self._depth += 1
            elif self._depth:
                self._depth -= 1
                if self._depth == 0:
                    found[begin:row] = True
                    begin = None
        if begin is not None:
            found[begin:] = True
        return found

    def _count(self, what: str, number: int) -> None:
        if number:
            self._skipped[what] = self._skipped.get(what, 0) + number


def _threads(rows: Any) -> list[tuple[int, int | None]]:
    """Threads that the first entries name, with their processes."""
    found: list[tuple[int, int | None]] = []
    for what, value in zip(rows["type"].tolist(), rows["addr"].tolist(), strict=True):
        if what == _THREAD:
            found.append((value, None))
        elif what == _PID and found:
            found[-1] = (found[-1][0], value)
    return found
