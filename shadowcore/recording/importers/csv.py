"""Comma-separated values: a line of names, then one for each access or event."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import TraceError
from ..format import FETCH, MODIFY, READ, WRITE, Event
from ..writer import Writer
from .processes import Processes
from .source import Progress, Source, sources

BOM = b"\xef\xbb\xbf"
"""The byte order mark that spreadsheets put before UTF-8."""

CSV_COLUMNS = ("kind", "process", "addr", "size", "prot", "flags", "file", "offset", "other")
"""Columns that a CSV may have; the first line names them."""
_ACCESS = {"read": READ, "write": WRITE, "fetch": FETCH, "modify": MODIFY}
_EVENT = {event.name.lower(): event for event in Event if event is not Event.RUN}
_LIMITS = {"process": 1 << 32, "prot": 1 << 32}


_STYLE: Any = {"strict": True, "skipinitialspace": True}
_INDEX = re.compile(r"|index|Unnamed: \d+")
"""Names of columns with which pandas numbers rows."""


def matches(head: bytes) -> bool:
    """The first line names columns that there are."""
    first = head.removeprefix(BOM).split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    try:
        names = _names(next(csv.reader([first], **_STYLE), []))
    except csv.Error:
        return False
    return len(names) > 1 and set(names) <= {*CSV_COLUMNS, ""} and "addr" in names


def _names(row: list[str]) -> list[str]:
    """The names of columns, "" for those that number rows."""
    names = [name.strip() for name in row]
    return ["" if _INDEX.fullmatch(name) else name for name in names]


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """Numbers are written as in C. Processes are those of the column `process`, in all files together."""
    processes = Processes(writer)
    for source in sources(paths, progress):
        with source:
            _read(source, writer, processes)


def _read(source: Source, writer: Writer, processes: Processes) -> None:
    path = source.path
    rows = csv.reader(_lines(source), **_STYLE)
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
            expected = f"a number {name} from 0 to {limit - 1:#x} expected, not {text!r:.40}{_form(text)}"
            raise TraceError(path, record, expected, "line")
        return value

    record, empty = 1, True
    try:
        names = _names(next(rows, []))
        used = [name for name in names if name]
        if not {"kind", "addr"} <= set(used) <= set(CSV_COLUMNS) or len(set(used)) != len(used):
            expected = (
                f"a first line that names columns of {', '.join(CSV_COLUMNS)}, kind and addr among them, expected"
            )
            raise TraceError(path, 1, expected, "line")
        for row in rows:
            record = rows.line_num
            if not row:
                continue
            empty = False
            if len(row) != len(names):
                raise TraceError(path, record, f"{len(names)} fields expected, not {len(row)}", "line")
            fields = {name: value.strip() for name, value in zip(names, row, strict=True) if name and value.strip()}
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
        if empty:
            raise TraceError(path, 2, "a line for an access or event expected, there is none", "line")
        flush()
    except csv.Error as error:
        flush()
        raise TraceError(path, rows.line_num, f"comma-separated values expected: {error}", "line") from None
    except TraceError:
        flush()
        raise


def _form(text: str) -> str:
    """How a number should have been written that was written in another way."""
    if re.fullmatch(r"0\d{1,22}", text) and text.strip("0"):
        octal = f", octal {int(text, 8):#o}" if set(text) <= set("01234567") else ""
        return f": decimal is written {text.lstrip('0')}, hexadecimal 0x{text.lstrip('0')}{octal}"
    if re.fullmatch(r"[0-9a-fA-F]{1,16}", text):
        return f": hexadecimal is written 0x{text}"
    if re.fullmatch(r"[0-9a-fA-F]{1,16}[hH]", text):
        return f": hexadecimal is written 0x{text[:-1]}"
    if re.fullmatch(r"\d{1,20}\.0*", text):
        return f": whole numbers are written {text.partition('.')[0]}"
    return ""


def _lines(source: Source) -> Iterator[str]:
    for number, data in source.lines():
        data = data.removeprefix(BOM) if number == 1 else data
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = number + data.count(b"\n", 0, error.start)
            raise TraceError(source.path, line, "lines of text in UTF-8 expected", "line") from None
        yield from io.StringIO(text, newline="")
