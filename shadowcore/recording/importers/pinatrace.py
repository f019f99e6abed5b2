"""Texts of Pin's example tools pinatrace, one a process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ..format import FETCH, READ, WRITE
from ..writer import Writer
from .processes import Processes
from .source import Access, Progress, each_line, sources

LENIENT = True

_NUMBER = rb"(?:0[xX])?([0-9a-fA-F]{1,16})"
_LINE = re.compile(rb"^[ \t]*%b: +([RW]) +%b(?:[ \t]+(\d{1,5})(?:[ \t]+\S+)?)?[ \t]*$" % (_NUMBER, _NUMBER), re.M)
_FIRST = re.compile(rb"(?:#[^\n]*\n|\s*\n)*[ \t]*0[xX][0-9a-fA-F]{1,16}: +[RW] +0[xX][0-9a-fA-F]{1,16}\s")
END = b"#eof"


def matches(head: bytes) -> bool:
    """The first line, but for comments, is an access: the instruction's address, R or W, and what it accesses."""
    return _FIRST.match(head) is not None


def read(
    paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None, lenient: bool = False
) -> None:
    """An instruction is fetched, of one byte, then it accesses. Lines in a row with its address are taken for the same.

    Where a line has no size, one byte is. A text without #eof at its end is incomplete, and the recording says so.
    """
    processes, complete = Processes(writer), True
    expected = "an access such as '0x401000: R 0x7ffe0000' expected"
    for source in sources(paths, progress):
        ip, ended = -1, False

        def access(line: tuple[bytes, ...]) -> list[Access] | None:
            nonlocal ip
            size = int(line[3] or 1)
            if not 1 <= size <= 0xFFFF:
                return None
            before, ip = ip, int(line[0], 16)
            made = READ if line[1] == b"R" else WRITE, size, int(line[2], 16)
            return [made] if ip == before else [(FETCH, 1, ip), made]

        def comment(line: bytes) -> bool:
            nonlocal ended
            ended = ended or line.strip() == END
            return line.lstrip().startswith(b"#")

        with source:
            processes.run(processes.new(None, text=source.path))
            each_line(source, writer, _LINE, access, expected, comment, lenient)
        complete = complete and ended
    writer.close(complete=complete)
