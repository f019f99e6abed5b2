"""Paths, and files that are replaced as a whole: written beside what they replace, made durable, then renamed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if sys.platform != "win32":  # there a file that is open cannot be removed
    import fcntl

if TYPE_CHECKING:
    from types import TracebackType

SUFFIX = ".partial"


def check_path(path: object, name: str = "path") -> str:
    """A path as a text; ConfigError for anything else. An integer is none: to `open` it is a file that is open."""
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]
        known = os.fsencode(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: a path is needed, not {path!r:.60}") from None
    if not known or 0 in known:
        raise ConfigError(f"{name}: a path is needed, not {path!r:.60}")
    return text


def _random() -> str:
    """Part of a name that no other process takes at the same time."""
    return os.urandom(8).hex()


class Replacement(io.RawIOBase):
    """A file that takes the place of `path` when it is complete: until then, and if it never is, nothing has changed.

    path: a link is followed, and what is there gives its permissions. What is no regular file (a terminal, a pipe,
    /dev/stdout) is written directly; a directory is refused. fixed: the file beside it is called path + ".partial", and
    somebody may look for it; else its name is its own, and several processes may replace one file.

    `write` writes all or raises: without a buffer, it is known what stands in the file after a failure. As a context
    manager it is complete when the context ends, and gone when that ends by an exception. If that came of a failure to
    write, the OSError is what is raised, whatever was made of it on the way. Each names `path` as it was given.

    What killed processes left beside the file, nobody holds locked any more: the next one to replace it removes it.
    """

    def __init__(self, path: str | os.PathLike[str], *, fixed: bool = False) -> None:
        super().__init__()
        self.path = check_path(path)
        self.failed: OSError | None = None
        self.beside: Path | None = None
        self._target = Path(os.path.realpath(self.path))
        with self._named():
            if not os.path.basename(self.path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            try:
                there = os.stat(self.path)
            except FileNotFoundError:
                there = None
            if there is not None and not stat.S_ISREG(there.st_mode):
                self._raw = io.FileIO(self.path, "w")
                return
            self._raw = self._fixed() if fixed else self._unique()
            if there is not None:
                os.chmod(self.beside or self.path, stat.S_IMODE(there.st_mode))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """An OSError of any file concerned becomes one of `path`; the first is kept."""
        try:
            yield
        except OSError as error:
            if self.failed is None:
                self.failed = type(error)(error.errno, error.strerror or str(error), self.path)
            raise self.failed from None

    def _fixed(self) -> io.FileIO:
        self.beside = self._target.with_name(self._target.name + SUFFIX)
        raw = io.FileIO(os.open(self.beside, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+")
        if _lock(raw) is False:
            raw.close()
            raise OSError(errno.EBUSY, f"somebody else is writing {self.beside.name}")
        raw.truncate(0)
        return raw

    def _unique(self) -> io.FileIO:
        name = os.fsdecode(os.fsencode(self._target.name)[:200])
        left = re.compile(re.escape(f".{name}.") + "[0-9a-f]{16}" + re.escape(SUFFIX))
        for entry in os.listdir(self._target.parent):
            if left.fullmatch(entry):
                _remove_left(self._target.parent / entry)
        while True:
            self.beside = self._target.parent / f".{name}.{_random()}{SUFFIX}"
            raw = io.FileIO(self.beside, "x+")
            # Between the two lines somebody may have taken it for left behind.
            if _lock(raw) is not False and self.beside.exists():
                return raw
            raw.close()

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        with self._named():
            while done < len(view):
                done += self._raw.write(view[done:]) or 0
        return len(view)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._raw.seekable()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def truncate(self, size: int | None = None, /) -> int:
        with self._named():
            return self._raw.truncate(size)

    def commit(self) -> None:
        """The file is complete: it and its new name reach the disk before this returns."""
        with self._named():
            if self.beside is not None:
                os.fsync(self._raw.fileno())
            if sys.platform == "win32":
                self._raw.close()  # an open file has no other name there
            if self.beside is not None:
                os.replace(self.beside, self._target)
                self.beside = None
                _sync_directory(self._target.parent)
            self.close()

    def discard(self) -> None:
        """Leave what was there as it is."""
        if sys.platform == "win32":
            self.close()
        if self.beside is not None:
            self.beside.unlink(missing_ok=True)
            self.beside = None
        self.close()

    def close(self) -> None:
        if hasattr(self, "_raw"):  # else the path could not be opened
            self._raw.close()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.commit()
        finally:
            self.discard()
        if isinstance(error, Exception) and self.failed is not None:
            raise self.failed from None


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file by way of one beside it: what was there stays if anything fails. OSError names `path`."""
    with Replacement(path) as file:
        file.write(data)


def place(path: str | os.PathLike[str], data: bytes) -> None:
    """Put a small file in place at once or not at all, without waiting for the disk and without a look around.

    For one of very many, each of which can be made again and tells by itself if it is cut short: a process that is
    killed leaves whole files, a machine that loses its power may not. OSError names `path`.
    """
    target = check_path(path)
    beside = f"{target}.{_random()}{SUFFIX}"
    try:
        try:
            with open(beside, "xb") as file:
                file.write(data)
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), target) from None


def lock(path: str | os.PathLike[str]) -> io.FileIO | None:
    """An open file that nobody else gets while it is open; None if somebody has it. Where there are no locks everybody
    gets it. OSError."""
    raw = io.FileIO(os.open(check_path(path), os.O_RDWR | os.O_CREAT, 0o666), "r+")
    if _lock(raw) is False:
        raw.close()
        return None
    return raw


def _lock(raw: io.FileIO) -> bool | None:
    """Lock a file for as long as it is open; False if another one has it, None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(raw.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True


def _remove_left(path: Path) -> None:
    """Remove a file that nobody writes any more: one that is written is locked or, on Windows, cannot be removed."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            path.unlink()
            return
        with io.FileIO(path, "r+") as raw:
            if _lock(raw):
                path.unlink()


def _sync_directory(path: Path) -> None:
    """A name in a directory is durable when the directory is. Not every system can say so."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
