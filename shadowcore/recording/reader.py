"""Reading recordings by blocks, each decoded and checked by itself, some of them ahead in threads."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import npy
from ..errors import ConfigError, TraceError
from ..files import check_path
from .format import (
    BLOCK_MAX,
    EVENT_DTYPE,
    FORMAT,
    GUEST,
    MACHINE,
    MODIFY,
    OPERATIONS,
    PROGRAM,
    STREAMS,
    VERSIONS,
    Accesses,
    Block,
    Event,
)
from .packing import Packed, from_npy

T = TypeVar("T")

MEMBER_MAX = BLOCK_MAX * EVENT_DTYPE.itemsize + (1 << 16)
"""Bytes of an array's member, at most."""
JSON_MAX = 1 << 28
"""Bytes of a member of JSON, at most."""
STRIP = 1 << 13
"""Records of a column that are decoded at a time into operations."""


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

    def __init__(self, path: str | os.PathLike[str], *, ahead: int | None = None) -> None:
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
        if self.header.get("version") not in VERSIONS:
            versions = " or ".join(map(str, VERSIONS))
            raise TraceError(self.path, None, f"version {versions} expected, not {self.header.get('version')!r}")
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
            self.guest["vcpus"] = self._number("guest", "vcpus") if "vcpus" in self.header["guest"] else 1
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
        there = {info.filename for info in self._zip.infolist()}
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
            value = json.loads(self._read(self._zip.getinfo(name), JSON_MAX))
        except (*npy.UNREADABLE, RecursionError) as error:
            raise TraceError(self.path, None, f"a member {name} expected: {error}") from None
        if not isinstance(value, dict):
            raise TraceError(self.path, None, f"an object in {name} expected")
        return value

    def _folders(self, root: str) -> tuple[list[list[_Member]], list[int]]:
        """Members and numbers of records of ROOT/NUMBER-RECORDS/NAME.npy, by number."""
        found: dict[int, tuple[int, list[_Member]]] = {}
        for info in self._zip.infolist():
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

    def _read(self, info: zipfile.ZipInfo, highest: int = MEMBER_MAX) -> bytes:
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
            packed = [Packed(name, self._dtypes[name], records, arrays) for name in names]
            # Few at a time, so that what one column leaves in the cache the next finds there.
            for begin in range(0, records, STRIP):
                end = min(begin + STRIP, records)
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
                array = from_npy(self._read(member.info))
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
            return {name: Packed(name, dtype, records, arrays).decode() for name, dtype in dtypes.items()}
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
        self._check_start()
        size = self._number("machine", "memory")
        dtypes = {"word": np.dtype("<u8"), "value": np.dtype("<u8")}
        members, counts = self._folders("memory")
        for number, count in enumerate(counts):
            columns = self._columns(self._arrays(members[number], 0, f"memory {number}"), dtypes, count, 0)
            if count and int(columns["word"].max()) >= size >> 3:
                raise TraceError(self.path, None, f"words of {size:#x} bytes of memory expected")
            self._check_sums((member.info for member in members[number]), None)
            yield columns["word"], columns["value"]

    def start(self) -> dict[str, int]:
        """The machine that a recording of operations starts on: registers of its processors by name, bytes of `memory`,
        number of `vcpus`. `shadowcore.trace.machine` builds it."""
        self._check_start()
        return {key: self._number("machine", key) for key in (*MACHINE, "memory", "vcpus")}

    def _check_start(self) -> None:
        if self.stream != OPERATIONS or "machine" not in self.header:
            raise TraceError(self.path, None, "a recording of operations with the machine that they start on expected")

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


def is_recording(path: str | os.PathLike[str]) -> bool:
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
