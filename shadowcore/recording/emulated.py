"""Recording a whole guest: QEMU runs it, a plug-in of the recorder's tells what its processors do to their tables."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..config import check_int
from ..errors import ConfigError, TraceError
from ..files import check_path
from .format import GUEST
from .plugin import Emulator, back_end, build, emulator
from .writer import Writer

RECORD = np.dtype(
    [("kind", "u1"), ("vcpu", "u1"), ("flags", "<u2"), ("insns", "<u4"), ("addr", "<u8"), ("value", "<u8")]
)
"""A record on its way from the plug-in."""
END = 255
"""Its kind, where the plug-in ends the stream."""
_HEAD = struct.Struct("<8sII4Q")
_MAGIC = b"SCGUEST1"
_MEMORY_MAX = 0xB0000000
"""Bytes of guest RAM: more are parted by the hole below 4 GiB."""
_PIPE = 1 << 20
_REFUSED = ("-accel", "-enable-kvm", "-mem-path", "-daemonize", "-plugin", "-runas", "-incoming", "-loadvm")
_UNITS = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}

Progress = Callable[[int, int], None]
"""Called now and then with the records, and the instructions executed by then."""


def record(
    command: Sequence[str],
    out: str | os.PathLike[str],
    *,
    filter_pages: int = 512,
    seconds: float | None = None,
    instructions: int | None = None,
    name: str | None = None,
    marks: Mapping[int, str] | None = None,
    progress: Progress | None = None,
) -> Writer:
    """Run a guest under QEMU, and write what its processors do from the moment that paging is first on.

    command: qemu-system-x86_64 with its arguments. filter_pages: pages whose accesses are told once (8-way, LRU).
    seconds, instructions: end the guest after so much; None: it ends by itself. marks: names of the phases that the
    guest's marks begin, by number. Returns the writer, closed.
    ConfigError if QEMU, a C compiler or the plug-in's source is not there, or if an argument does not go with
    recording. Where the recording is interrupted (Ctrl-C, SIGTERM), or QEMU dies, what was recorded is kept, marked as
    incomplete.
    """
    out = check_path(out, "out")
    if not command:
        raise ConfigError("command: qemu-system-x86_64 with its arguments is needed")
    check_int("filter_pages", filter_pages, 8, 1 << 20)
    if filter_pages & (filter_pages - 1):
        raise ConfigError(f"filter_pages: a power of two is needed, not {filter_pages}")
    limit = 0 if instructions is None else check_int("instructions", instructions, 1, 1 << 63)
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds: a positive time is needed, not {seconds}")
    named = {str(check_int("marks", number, 0, (1 << 64) - 1)): phase for number, phase in (marks or {}).items()}
    if "boot" in named.values() or len(set(named.values())) < len(named) or not all(named.values()):
        raise ConfigError("marks: a name of its own for each is needed, and none of them 'boot'")
    command = [os.fspath(word) for word in command]
    arguments = command[1:]
    memory = _memory(arguments)
    found = emulator(command[0])
    plugin = build(back_end(found.version))
    ours, theirs = os.pipe()
    before = _end_by_termination()
    try:
        import fcntl  # not on Windows

        with suppress(OSError, AttributeError):
            fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, _PIPE)
        with _ram(memory) as ram:
            path, library = ram.replace(",", ",,"), str(plugin).replace(",", ",,")  # as QEMU's options have it
            options = f"ram={path},frames={memory >> 12},fd={theirs},filter={filter_pages},instructions={limit}"
            added = ["-object", f"memory-backend-file,id=screc,size={memory},mem-path={path},share=on"]
            added += [
                "-machine",
                "memory-backend=screc",
                "-accel",
                "tcg,thread=single",
                "-plugin",
                f"{library},{options}",
            ]
            child = subprocess.Popen([found.path, *arguments, *added], pass_fds=(theirs,))
            os.close(theirs)
            theirs = -1
            source = {
                "format": "qemu",
                "command": command,
                "qemu": found.text,
                "filter_pages": filter_pages,
            }
            if named:
                source["marks"] = named
            title = Path(out).name.split(".")[0] if name is None else name
            stream = _Stream(ours, child, seconds, progress)
            return _write(stream, out, title, source, found)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def _end_by_termination() -> Any:
    """Let SIGTERM be as Ctrl-C, so that neither the emulator nor its memory outlives this process. Returns the handler
    before, None where it is not for this thread to say."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


def _write(stream: _Stream, out: str, title: str, source: dict[str, object], found: Emulator) -> Writer:
    try:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            status = stream.end()
            if stream.interrupted is not None:
                raise stream.interrupted
            raise TraceError(
                found.path, None, f"a guest that turns paging on expected; QEMU ended with status {status}"
            )
        magic, vcpus, interface, nframes, cr0, cr4, efer = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise TraceError(found.path, None, "the stream of the recorder's plug-in expected")
        guest = {"cr0": cr0, "cr4": cr4, "efer": efer, "nframes": nframes, "vcpus": vcpus}
        with Writer(out, GUEST, name=title, source=source | {"interface": interface}, guest=guest) as writer:
            for records in stream.records():
                writer.write(records)
            stream.end()
            if stream.interrupted is not None:
                raise stream.interrupted
            writer.close(complete=stream.complete)
        return writer
    finally:
        stream.end()


class _Stream:
    """What comes from the plug-in, until the guest has ended or its time is over.

    complete: the plug-in has said that it was all. interrupted: by Ctrl-C, after which the rest is still read.
    """

    def __init__(
        self, fd: int, child: subprocess.Popen[bytes], seconds: float | None, progress: Progress | None
    ) -> None:
        self.complete = False
        self.interrupted: KeyboardInterrupt | None = None
        self._fd, self._child, self._progress = fd, child, progress
        self._until = None if seconds is None else time.monotonic() + seconds
        self._told = 0

    def _some(self, size: int) -> bytes:
        while True:
            try:
                wait = None if self._until is None else max(self._until - time.monotonic(), 0)
                if select.select([self._fd], [], [], wait)[0]:
                    return os.read(self._fd, size)
            except KeyboardInterrupt as error:
                if self.interrupted is not None:
                    raise
                self.interrupted = error
            self._child.send_signal(signal.SIGTERM)  # it ends the guest, and the plug-in the stream
            self._until = None

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._some(size - len(data))
            if not part:
                break
            data += part
        return data

    def records(self) -> Iterator[np.ndarray[tuple[int], np.dtype[np.void]]]:
        """Records, some at a time, up to the last, which is none of the guest's: what comes after it is no record."""
        rest = b""
        done = passed = 0
        while data := self._some(_PIPE):
            if self.complete:
                continue  # read, for the emulator not to wait for that
            data = rest + data
            whole = len(data) // RECORD.itemsize * RECORD.itemsize
            found, rest = np.frombuffer(data[:whole], RECORD), data[whole:]
            ends = np.flatnonzero(found["kind"] == END)
            if len(ends):
                self.complete = True
                found = found[: ends[0]]
            done += len(found)
            passed += int(found["insns"].sum(dtype=np.uint64))
            if len(found):
                yield found
            if self._progress is not None and time.monotonic_ns() >> 27 != self._told:
                self._told = time.monotonic_ns() >> 27
                self._progress(done, passed)

    def end(self) -> int:
        """End the emulator, if it has not ended. Returns its exit status."""
        if self._child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(0.2 if self.complete else 0)
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
            self._child.kill()
        return self._child.wait()


@contextmanager
def _ram(size: int) -> Iterator[str]:
    """A file for the guest's memory: in memory itself where there is room."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > size
    with tempfile.TemporaryDirectory(prefix="shadowcore-", dir=shared if in_memory else None) as folder:
        if shutil.disk_usage(folder).free < size:
            raise ConfigError(f"{folder}: room for {size >> 20} MiB of guest memory is needed")
        yield f"{folder}/ram"


def _memory(arguments: list[str]) -> int:
    """Bytes of guest RAM by QEMU's arguments. ConfigError for those that do not go with recording."""
    size = 128 << 20
    for place, argument in enumerate(arguments):
        option = f"-{argument.lstrip('-')}"
        value = arguments[place + 1] if place + 1 < len(arguments) else ""
        if option in _REFUSED or (option in ("-machine", "-M") and re.search(r"accel=|memory-backend=", value)):
            raise ConfigError(f"command: {argument} {value} does not go with recording, which has settings of its own")
        if option == "-m":
            size = _size(value)
    if size > _MEMORY_MAX:
        raise ConfigError(f"command: -m: {_MEMORY_MAX >> 20} MiB of guest memory at most, not {size >> 20}")
    return size


def _size(value: str) -> int:
    fields = dict(part.partition("=")[::2] for part in value.split(",") if "=" in part)
    text = fields.get("size", value.split(",")[0])
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([KMGT]?)B?", text.upper())
    if found is None or fields.keys() & {"slots", "maxmem"}:
        raise ConfigError(f"command: -m: a size that stays is needed, as 512M, not {value!r}")
    size = int(float(found[1]) * (1 << _UNITS[found[2]]))
    if size < 1 << 20 or size % 4096:
        raise ConfigError(f"command: -m: whole pages, 1 MiB or more, are needed, not {value!r}")
    return size
