"""What importers share: the bytes of a file, inflated, and the files of an import one after the other."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import TraceError
from ...files import check_path

Progress = Callable[[int, int], None]
"""Called now and then with bytes of input done, and of all, 0 where that is not known."""

CHUNK = 1 << 20
LINE_MAX = 1 << 16
"""Bytes of the longest line of a text."""

_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


class Source:
    """A file's bytes, inflated where it is .gz or .xz (by content, not by name), and how far reading them is."""

    def __init__(self, path: str | os.PathLike[str], progress: Progress | None = None, done: int = 0, total: int = 0):
        self.path = path = check_path(path)
        self._progress = progress
        self._before, self._total = done, total
        self.position = 0
        try:
            self._raw = open(path, "rb")  # noqa: SIM115
            head = self._raw.read(6)
            if self._raw.seekable():
                self._raw.seek(0)
            else:
                raise TraceError(path, None, "a file expected, not a pipe")
        except OSError as error:
            raise TraceError(path, None, f"a readable file expected: {error.strerror}") from None
        self._file: Any
        if head[:2] == b"\x1f\x8b":
            self._file = gzip.GzipFile(fileobj=self._raw)
        elif head == b"\xfd7zXZ\x00":
            self._file = lzma.LZMAFile(self._raw)  # noqa: SIM115
        else:
            self._file = self._raw

    def read(self, size: int = CHUNK) -> bytes:
        """Up to this many bytes, none at the end; TraceError if the compressed data are damaged or cut short."""
        try:
            data: bytes = self._file.read(size)
        except _DAMAGED as error:
            expected = f"whole compressed data expected, behind byte {self.position} of the contents: {error}"
            raise TraceError(self.path, None, expected) from None
        self.position += len(data)
        if self._progress is not None:
            self._progress(self._before + self._raw.tell(), self._total)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sources(paths: Sequence[str | os.PathLike[str]], progress: Progress | None) -> Iterator[Source]:
    """Each file, opened when it is its turn; whoever uses it closes it."""
    done, total = 0, sum(map(_size, paths))
    for path in paths:
        yield Source(path, progress, done, total)
        done += _size(path)


def _size(path: str | os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
