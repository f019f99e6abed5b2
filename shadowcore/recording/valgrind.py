"""Recording a program under Valgrind's lackey, with all the processes that it makes."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, TraceError
from ..files import check_path
from .format import PROGRAM
from .importers import kept
from .importers.lackey import LackeyParser
from .importers.processes import Processes
from .writer import Writer

OPTIONS = ("--tool=lackey", "--trace-mem=yes", "--trace-syscalls=yes", "--trace-children=yes", "--vgdb=no")
HELD_MAX = 1 << 26
"""Bytes of text that are held back until the process they come from is known by the one that made it."""

_RESERVED = 12
"""File descriptors at the top that Valgrind keeps from the program."""


def record(
    command: Sequence[str],
    out: str | os.PathLike[str],
    *,
    valgrind: str = "valgrind",
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Writer:
    """Run a program under Valgrind, and write what its processes do, in the order in which they do it.

    progress: called now and then with the bytes of text that came, and 0. Returns the writer, closed; its process 0
    has the exit status of the program. ConfigError if Valgrind, or the program, is not there. Where the recording is
    interrupted, the program is ended, and what was recorded is kept, marked as incomplete.
    """
    out = check_path(out, "out")
    if not command:
        raise ConfigError("command: a program is needed")
    tool = shutil.which(valgrind)
    if tool is None:
        raise ConfigError(
            f"valgrind: {valgrind!r} is not installed here; it is the package `valgrind` of Debian, Ubuntu and Fedora"
        )
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError(f"command: there is no program {command[0]!r}")
    if os.path.exists(out) and os.path.samefile(program, out):
        raise ConfigError(f"out: another file than the program {program} is needed")
    title = Path(command[0]).name if name is None else name
    source = {"format": "lackey", "command": list(command), "valgrind": _version(tool)}
    with kept(out), Writer(out, PROGRAM, name=title, source=source) as writer:
        _run(tool, command, writer, progress)
    return writer


def _version(tool: str) -> str:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _run(tool: str, command: Sequence[str], writer: Writer, progress: Callable[[int, int], None] | None) -> None:
    # A line of lackey's does not say which process it comes from; a socket says so of all that is written to it.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            for end, option in ((ours, socket.SO_RCVBUF), (theirs, socket.SO_SNDBUF)):
                end.setsockopt(socket.SOL_SOCKET, option, 1 << 22)
            child = _start(tool, command, theirs)
        try:
            count = _receive(ours, command[0], writer, progress)
        except BaseException:
            ours.close()  # or it would wait for its text to be read
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(5)
            child.kill()
            child.wait()
            raise
    status = child.wait()
    if not count:
        raise TraceError(command[0], None, f"a program that Valgrind can run expected; it ended with status {status}")
    writer.processes[0]["status"] = status


def _start(tool: str, command: Sequence[str], theirs: socket.socket) -> subprocess.Popen[bytes]:
    import resource  # not on Windows, where Valgrind is not either

    # The program must not be able to close the socket: Valgrind keeps descriptors near the limit for itself.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = min(hard, soft + _RESERVED) if hard != resource.RLIM_INFINITY else soft + _RESERVED
    fd = top - _RESERVED // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    try:
        os.dup2(theirs.fileno(), fd, inheritable=True)
        try:
            limited = ["/bin/sh", "-c", f'ulimit -n {top} && exec "$@"', "sh"]
            return subprocess.Popen([*limited, tool, *OPTIONS, f"--log-fd={fd}", *command], pass_fds=(fd,))
        finally:
            os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _receive(ours: socket.socket, name: str, writer: Writer, progress: Callable[[int, int], None] | None) -> int:
    """Parse what the processes print until the last has ended. Returns their number."""
    processes = Processes(writer)
    parsers: dict[int, LackeyParser] = {}
    held: dict[int, list[bytes]] = {}
    amount = received = 0

    def adopt(pid: int) -> None:
        number = processes.by_pid.get(pid)
        if number is None:
            number = processes.new(pid)
        parsers[pid] = LackeyParser(
            writer,
            number,
            f"{name}, process {pid}",
            run=processes.run,
            child=lambda made: processes.child(number, made),
        )
        for data in held.pop(pid, ()):
            parsers[pid].feed(data)

    while True:
        data, ancillary, _, _ = ours.recvmsg(1 << 18, socket.CMSG_SPACE(12))
        if not data:
            break
        (pid, _, _) = struct.unpack("3i", ancillary[0][2])
        if pid not in parsers:
            if parsers and pid not in processes.by_pid and amount < HELD_MAX:
                # Its first accesses may come before its parent has printed that it made it.
                held.setdefault(pid, []).append(data)
                amount += len(data)
                continue
            adopt(pid)
        parsers[pid].feed(data)
        for known in [known for known in held if known in processes.by_pid]:
            amount -= sum(map(len, held[known]))
            adopt(known)
        received += len(data)
        if progress is not None and received >> 16 != (received - len(data)) >> 16:
            progress(received, 0)
    for known in list(held):
        adopt(known)
    for parser in parsers.values():
        parser.end()
    return len(parsers)
