"""Comma-separated values: a line of names, then one for each access or event."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import TraceError
from ..format import FETCH, MODIFY, READ, WRITE, Event
from ..writer import Writer
from .processes import Processes
from .source import LINE_MAX, Progress, Source, sources

NAME = "csv"

CSV_COLUMNS = ("kind", "process", "addr", "size", "prot", "flags", "file", "offset", "other")
"""Columns that a CSV may have; the first line names them."""
_ACCESS = {"read": READ, "write": WRITE, "fetch": FETCH, "modify": MODIFY}
_EVENT = {event.name.lower(): event for event in Event if event is not Event.RUN}
_LIMITS = {"process": 1 << 32, "prot": 1 << 32}


def matches(head: bytes) -> bool:
    """The first line names columns that there are."""
    first = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    return "," in first and set(map(str.strip, first.split(","))) <= set(CSV_COLUMNS) and "addr" in first


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """Numbers are written as in C. Processes are those of the column `process`, in all files together."""
    processes = Processes(writer)
    for source in sources(paths, progress):
        with source:
            _read(source, writer, processes)


def _read(source: Source, writer: Writer, processes: Processes) -> None:
    path = source.path
    rows = csv.reader(_lines(source), strict=True)
    accesses: list[tuple[int, int, int]] = []

    def flush() -> None:
        if accesses:
            op, size, addr = zip(*accesses, strict=True)
            writer.write(op=np.array(op), size=np.array(size), addr=np.array(addr, dtype=np.uint64))
            accesses.clear()

    def number(name: str, text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            value = -1
        limit = _LIMITS.get(name, 1 << 64)
        if not 0 <= value < limit:
            raise TraceError(
                path, record, f"a number {name} from 0 to {limit - 1:#x} expected, not {text!r:.40}", "line"
            )
        return value

    record = 1
    try:
        names = [name.strip() for name in next(rows, [])]
        if not {"kind", "addr"} <= set(names) <= set(CSV_COLUMNS) or len(set(names)) != len(names):
            expected = (
                f"a first line that names columns of {', '.join(CSV_COLUMNS)}, kind and addr among them, expected"
            )
            raise TraceError(path, 1, expected, "line")
        for row in rows:
            record = rows.line_num
            if not row:
                continue
            if len(row) != len(names):
                raise TraceError(path, record, f"{len(names)} fields expected, not {len(row)}", "line")
            fields = {name: value.strip() for name, value in zip(names, row, strict=True) if value.strip()}
            kind = fields.pop("kind", "").lower()
            file = fields.pop("file", None)
            values = {name: number(name, value) for name, value in fields.items()}
            process = values.pop("process", 0)
            if process >= len(writer.processes):
                if process > len(writer.processes):
                    expected = f"process {len(writer.processes)} expected before process {process}"
                    raise TraceError(path, record, expected, "line")
                processes.new(None)
            if process != processes.running:
                flush()
                processes.run(process)
            if kind in _ACCESS:
                size = values.get("size", 1)
                if "addr" not in values or not 1 <= size <= 0xFFFF:
                    raise TraceError(path, record, f"an addr, and a size from 1 to 65535, expected, not {size}", "line")
                accesses.append((_ACCESS[kind], size, values["addr"]))
                if len(accesses) >= 1 << 14:
                    flush()
            elif kind in _EVENT:
                flush()
                writer.event(_EVENT[kind], process, file, **values)
            else:
                known = ", ".join([*_ACCESS, *_EVENT])
                raise TraceError(path, record, f"a kind of {known} expected, not {kind!r:.40}", "line")
        if record == 1:
            raise TraceError(path, 2, "a line for an access or event expected, there is none", "line")
        flush()
    except csv.Error as error:
        flush()
        raise TraceError(path, rows.line_num, f"comma-separated values expected: {error}", "line") from None
    except TraceError:
        flush()
        raise


def _lines(source: Source) -> Iterator[str]:
    tail, count = b"", 1
    while True:
        new = source.read()
        data = tail + new
        stop = data.rfind(b"\n") + 1 if new else len(data)
        data, tail = data[:stop], data[stop:]
        wrong = data.find(b"\0")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            wrong = error.start
        if wrong >= 0:
            raise TraceError(
                source.path, count + data.count(b"\n", 0, wrong), "lines of text in UTF-8 expected", "line"
            )
        count += text.count("\n")
        if len(tail) > LINE_MAX:
            raise TraceError(source.path, count, f"lines of text expected, of {LINE_MAX} bytes at most", "line")
        yield from io.StringIO(text, newline="")
        if not new:
            return
