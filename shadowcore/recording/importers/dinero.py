"""Texts in Dinero's input format (din), one a process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ..format import FETCH, READ, WRITE
from ..writer import Writer
from .processes import Processes
from .source import LINE_MAX, Access, Progress, each_line, sources

LENIENT = True

_LINE = re.compile(rb"^[ \t]*([0-4rwi])[ \t]+(?:0[xX])?([0-9a-fA-F]{1,16})(?:[ \t]+([0-9a-fA-F]{1,4}))?[ \t]*$", re.M)
_KINDS = {b"0": READ, b"1": WRITE, b"2": FETCH, b"r": READ, b"w": WRITE, b"i": FETCH}
UNKNOWN, FLUSHES = "escape records (3)", "cache flushes (4)"
_SKIPPED = {b"3": UNKNOWN, b"4": FLUSHES}
LOWEST = 1 << 12


def matches(head: bytes) -> bool:
    """The first lines are a label and an address, none in the lowest page, where nothing is mapped."""
    lines = head[:LINE_MAX].splitlines(keepends=True)[:100]
    whole = [line.strip() for line in lines if line.endswith(b"\n")]
    found = [_LINE.match(line) for line in whole]
    return bool(found) and all(match is not None and int(match[2], 16) >= LOWEST for match in found)


def read(
    paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None, lenient: bool = False
) -> None:
    """Labels 0, 1, 2 (r, w, i) are a read, a write, a fetch, of one byte where the line has no size in hexadecimal."""
    processes = Processes(writer)

    def access(line: tuple[bytes, ...]) -> list[Access] | None:
        size = int(line[2] or b"1", 16)
        if not size:
            return None
        if what := _SKIPPED.get(line[0]):
            writer.skipped[what] = writer.skipped.get(what, 0) + 1
            return []
        return [(_KINDS[line[0]], size, int(line[1], 16))]

    for source in sources(paths, progress):
        with source:
            processes.run(processes.new(None, text=source.path))
            each_line(
                source, writer, _LINE, access, "an access such as '0 7ffe0000' expected", lambda line: False, lenient
            )
