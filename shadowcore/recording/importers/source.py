"""What importers share: the bytes of a file or pipe, inflated, its lines, and the files of an import in turn."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from ...errors import TraceError
from ...files import check_path
from ..writer import Writer

Progress = Callable[[int, int], None]
"""Called now and then with bytes of input done, and of all, 0 where that is not known."""

CHUNK = 1 << 20
LINE_MAX = 1 << 16
"""Bytes of the longest line of a text."""
HEAD = 1 << 16
"""Bytes that tell a format."""
STDIN = "-"
"""The path of standard input; a file of this name is ./-"""

_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, ValueError)
_LZMA_ALONE = b"\x5d\0\0"


class Pipe:
    """A file that can be read once. What its format is told by is kept, and read again by whoever opens it first."""

    def __init__(self, path: str) -> None:
        self.path = "standard input" if path == STDIN else path
        if path == STDIN and sys.stdin is None:
            raise TraceError("standard input", None, "something to read expected, it is closed")
        self._raw: IO[bytes] = sys.stdin.buffer if path == STDIN else open(path, "rb")  # noqa: SIM115
        self._kept = b""
        self._used = False

    def __fspath__(self) -> str:
        return self.path

    def open(self, keep: bool) -> io.RawIOBase:
        """From its beginning. keep: only its first bytes will be read, and are there again for the next to open it."""
        if self._used:
            raise TraceError(self.path, None, "a file expected, not a pipe: this format is read twice")
        self._used = not keep
        return _Piped(self, keep)

    def more(self, size: int) -> bytes:
        """The next bytes; some are enough, but of the first as many as tell a compressed file."""
        data = b""
        while len(data) < min(size, 16) and (more := self._read(size - len(data))):
            data += more
        return data

    def _read(self, size: int) -> bytes:
        return self._raw.read1(size) if isinstance(self._raw, io.BufferedReader) else self._raw.read(size)

    def close(self) -> None:
        """Nobody reads it any more."""
        if self._raw is not sys.stdin.buffer:
            self._raw.close()


class _Piped(io.RawIOBase):
    """A pipe's bytes, from its beginning."""

    def __init__(self, pipe: Pipe, keep: bool) -> None:
        self._pipe, self._keep, self._at = pipe, keep, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._pipe._kept[self._at : self._at + len(buffer)]
        if not data:
            data = self._pipe.more(len(buffer))
            if self._keep:
                self._pipe._kept += data
        self._at += len(data)
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self._keep and not self.closed:
            self._pipe.close()
        super().close()


def opened(path: str | os.PathLike[str]) -> str | Pipe:
    """What an import reads more than once, to tell its format: a path, or a pipe."""
    if isinstance(path, Pipe):
        return path
    path = check_path(path)
    try:
        if path == STDIN or not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):
            return Pipe(path)
    except OSError as error:
        raise TraceError(path, None, f"a readable file expected: {error.strerror}") from None
    return path


class Source:
    """A file's bytes, inflated where it is compressed (by content, not by name), and how far reading them is.

    keep: only the first bytes will be read, of a pipe too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        progress: Progress | None = None,
        done: int = 0,
        total: int = 0,
        keep: bool = False,
    ):
        found = opened(path)
        self.path = found.path if isinstance(found, Pipe) else found
        self._progress = progress
        self._before, self._total = done, total
        self.position = 0
        self._damaged: type[Exception] = EOFError  # what the decompressor raises, beside what all do
        self._raw: Any
        try:
            raw = found.open(keep) if isinstance(found, Pipe) else open(found, "rb", 0)  # noqa: SIM115
            self._raw = io.BufferedReader(raw)
            head = _peek(self._raw)
        except OSError as error:
            raise TraceError(self.path, None, f"a readable file expected: {error.strerror}") from None
        try:
            self._file: Any = self._inflated(head)
        except BaseException:
            self._raw.close()
            raise

    def _inflated(self, head: bytes) -> Any:
        if head[:2] == b"\x1f\x8b":
            return gzip.GzipFile(fileobj=self._raw)
        if head[:6] == b"\xfd7zXZ\x00" or (head[:3] == _LZMA_ALONE and len(head) > 12 and head[12] in (0, 0xFF)):
            return lzma.LZMAFile(self._raw)
        if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
            return bz2.BZ2File(self._raw)
        if head[:4] == b"\x28\xb5\x2f\xfd":
            return self._zstd()
        for mark, name, tool in _PACKED:
            if head.startswith(mark):
                raise TraceError(self.path, None, f"this is {name}, which is not read here: unpack it first, by {tool}")
        return self._raw

    def _zstd(self) -> Any:
        for name in ("compression.zstd", "backports.zstd"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            self._damaged = module.ZstdError
            return module.ZstdFile(self._raw)
        expected = (
            "this is compressed by zstd, which needs Python 3.14 or the extra zstd: pip install 'shadowcore[zstd]'"
        )
        raise TraceError(self.path, None, f"{expected}; or zstd -dc FILE | shadowcore import -")

    def read(self, size: int = CHUNK) -> bytes:
        """Up to this many bytes, none at the end; TraceError if the compressed data are damaged or cut short."""
        try:
            data: bytes = self._file.read(size)
        except (*_DAMAGED, self._damaged) as error:
            if self._file is self._raw:
                reason = getattr(error, "strerror", None) or error
                raise TraceError(self.path, None, f"a readable file expected: {reason}") from None
            expected = f"whole compressed data expected, behind byte {self.position} of the contents: {error}"
            raise TraceError(self.path, None, expected) from None
        self.position += len(data)
        if self._progress is not None:
            self._progress(self._before + self._raw.tell(), self._total)
        return data

    def head(self, size: int = HEAD) -> bytes:
        """The first bytes, so many unless it is shorter."""
        data = b""
        while len(data) < size and (more := self.read(size - len(data))):
            data += more
        return data

    def lines(self, chunk: int = CHUNK) -> Iterator[tuple[int, bytes]]:
        """Text in parts of whole lines, each with the number of its first, from 1. CR LF is LF; the last line need have
        no end. TraceError for what is no text."""
        tail, number = b"", 1
        while True:
            new = self.read(chunk)
            data = tail + new
            stop = data.rfind(b"\n") + 1 if new else len(data)
            data, tail = data[:stop], data[stop:]
            if (wrong := data.find(b"\0")) >= 0:
                raise TraceError(self.path, number + data.count(b"\n", 0, wrong), "lines of text expected", "line")
            if data:
                count = data.count(b"\n")
                yield number, data.replace(b"\r\n", b"\n") if b"\r" in data else data
                number += count
            if len(tail) > LINE_MAX:
                raise TraceError(self.path, number, f"lines of text expected, of {LINE_MAX} bytes at most", "line")
            if not new:
                return

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_PACKED = (
    (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -d"),
    (b"\xff\x06\0\0sNaPpY", "compressed by snappy", "snzip -d"),
    (b"7z\xbc\xaf\x27\x1c", "an archive of 7-Zip", "7z x"),
    (b"Rar!\x1a\x07", "an archive of RAR", "unrar"),
)
"""Marks of what is not inflated here, what it is, what does it."""


def _peek(raw: io.BufferedReader) -> bytes:
    """The first bytes, which stay; of a pipe those that have come."""
    return raw.peek(16)[:16]


def sources(paths: Sequence[str | os.PathLike[str]], progress: Progress | None) -> Iterator[Source]:
    """Each file, opened when it is its turn; whoever uses it closes it."""
    done, total = 0, sum(map(_size, paths))
    for path in paths:
        yield Source(path, progress, done, total)
        done += _size(path)


def _size(path: str | os.PathLike[str]) -> int:
    if isinstance(path, Pipe):
        return 0
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


Access = tuple[int, int, int]
"""Kind, size, address."""
OTHERS = "lines of others"
"""What is skipped, as it is counted."""


def each_line(
    source: Source,
    writer: Writer,
    pattern: re.Pattern[bytes],
    access: Callable[[tuple[bytes, ...]], list[Access] | None],
    expected: str,
    comment: Callable[[bytes], bool],
    lenient: bool,
) -> None:
    """Write the accesses of a text in which each line is one. TraceError, behind what comes before it, for one that is
    none; lenient: it is skipped and counted. Lines without anything in them, and comments, are no others'.

    pattern: of a line, from ^ to $. access: what the groups of a match come to; None: that is no access after all.
    """
    total = 0
    for number, text in source.lines():
        rows: list[Access] = []
        try:
            for offset, line in enumerate(_matched(pattern, text)):
                if isinstance(line, tuple):
                    found = access(line)
                    if found is not None:
                        rows += found
                        continue
                elif not line.strip() or comment(line):
                    continue
                if not lenient:
                    shown = ascii(text.split(b"\n")[offset][:60].decode("latin-1"))
                    raise TraceError(source.path, number + offset, f"{expected}, not {shown}", "line")
                writer.skipped[OTHERS] = writer.skipped.get(OTHERS, 0) + 1
        finally:
            total += len(rows)
            if rows:
                op, size, addr = zip(*rows, strict=True)
                writer.write(op=np.array(op), size=np.array(size), addr=np.array(addr, dtype=np.uint64))
    if not total:
        raise TraceError(source.path, 1, f"{expected}, there is none", "line")


def _matched(pattern: re.Pattern[bytes], text: bytes) -> list[tuple[bytes, ...]] | list[tuple[bytes, ...] | bytes]:
    """For each line the groups of its match, or the line if there is none."""
    found: list[tuple[bytes, ...]] = pattern.findall(text)
    if len(found) == text.count(b"\n") + (not text.endswith(b"\n")):
        return found
    return [match.groups(b"") if (match := pattern.match(line)) else line for line in text.split(b"\n")]
