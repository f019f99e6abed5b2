"""Texts of Valgrind's lackey, one a process."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import TraceError
from ..format import CLONE_VM, FETCH, MODIFY, READ, WRITE, Event
from ..writer import Writer
from . import lackey_text
from .processes import Processes
from .source import CHUNK, LINE_MAX, OTHERS, Progress, Source, sources

LENIENT = True
ROOM = CHUNK // 4
"""Accesses that are parsed at a time."""

_CALL = re.compile(
    rb"SYSCALL\[(?P<pid>\d{1,10}),(?P<tid>\d+)\]\(\s*\d+\) (?P<name>(?:sys_|old_)?\w+) ?\((?P<args>.*)$", re.S
)
_RESUMED = re.compile(rb"SYSCALL\[(?P<pid>\d+),(?P<tid>\d+)\]\(\s*\d+\) +\.\.\. \[async\] --> (?P<end>.*)$", re.S)
_CREATED = re.compile(rb"process \d+ created child (\d{1,10})\b")
_SUCCESS = re.compile(rb"Success\((0x[0-9a-fA-F]{1,16})\)")
_FLAGS = re.compile(rb"[\s(]*([0-9a-fA-F]{1,16})\s*[,)]")
_TIME = rb"(?:\d\d+:\d\d:\d\d:\d\d\.\d{3} )?"  # before the process, with --time-stamp=yes
_BANNER = re.compile(rb"==%b(?P<pid>\d{1,10})== (?P<text>.*)$" % _TIME)
_SAID = re.compile(rb"\s*(==|--|\*\*)%b\d+(==|--|\*\*)|0x[0-9a-f]+: \[\d+\]=\{" % _TIME)
"""What Valgrind itself says; with -v -v it prints unwind tables too, with nothing before them."""
_MESSAGE = re.compile(rb"SYSCALL\[|\s+--> \[| *--> |\s*$")
_SUPERBLOCK = re.compile(rb"\s*SB [0-9a-fA-F]{1,16}\s*$")
_BLANKS = re.compile(rb"\s*([ILSM])\s+([0-9a-fA-F]{1,16}),(\d{1,5})\s*$")
"""An access as `lackey_text` has it, but for the blanks."""
_PATH = re.compile(rb"0x[0-9a-fA-F]+\((.*)\),")
# After an exec that succeeds the new program's first line follows the call without an end of the line: a banner, or
# with -q an access.
_NEW_IMAGE = re.compile(rb"==%b\d+== |(?<=\))(?:I | [LSM]) [0-9a-fA-F]{1,16},\d{1,5}$" % _TIME)
_EXEC = ("execve", "execveat")
_KINDS = {b"I": FETCH, b"L": READ, b"S": WRITE, b"M": MODIFY}

SUPERBLOCKS = "superblocks (--trace-superblocks)"


class LackeyParser:
    """The text that one process prints under lackey, as it comes, into a recording of a program.

    writer: where the accesses and events go. number: of the process in it. name: of the text, for errors.
    run: called before anything is written for the process.  child: called with the pid of a new process, returns its
    number.  lenient: lines that are none of lackey's, such as what the program printed, are skipped and counted.
    """

    def __init__(
        self,
        writer: Writer,
        number: int,
        name: object,
        *,
        run: Callable[[int], None],
        child: Callable[[int], int],
        lenient: bool = False,
    ) -> None:
        self.lines = 0
        self.traced = False  # there was an access or a system call: messages alone are what every tool prints
        self.pid: int | None = None
        self._image: str | None = None  # a command whose program may be new
        self._writer, self._number, self._name = writer, number, name
        self._run, self._child, self._lenient = run, child, lenient
        self._tail = b""
        self._room = ROOM
        self._op = np.empty(self._room, dtype=np.uint8)
        self._size = np.empty(self._room, dtype=np.uint16)
        self._addr = np.empty(self._room, dtype=np.uint64)
        self._pending: dict[bytes, tuple[str, bytes]] = {}  # by thread: a call whose result has not been printed
        self._files: dict[int, str] = {}
        self._open: tuple[str, bytes, bytes] | None = None  # a call whose line goes on in the next

    def _error(self, expected: str) -> TraceError:
        return TraceError(self._name, self.lines + 1, expected, "line")

    def feed(self, data: bytes) -> None:
        """Take the next part of the text; TraceError names the line that cannot be."""
        text = self._tail + data if self._tail else data
        if b"\r" in text:
            # A carriage return at the end may be half of an end of line.
            cut = len(text) - text.endswith(b"\r")
            self._feed(text[:cut].replace(b"\r\n", b"\n"))
            self._tail += text[cut:]
        else:
            self._feed(text)

    def _feed(self, text: bytes) -> None:
        at, end, filled = 0, len(text), 0
        while True:
            before = filled
            at, filled, what = lackey_text.parse(text, at, end, self._op, self._size, self._addr, filled)
            self.lines += filled - before
            if what == lackey_text.FULL:
                filled = self._put(filled)
                continue
            if what == lackey_text.MORE:
                break
            stop = text.find(b"\n", at, at + LINE_MAX)
            line = text[at:stop] if stop >= 0 else text[at : at + 60]
            if stop < 0 and (what == lackey_text.BAD or end - at >= LINE_MAX):
                self._put(filled)
                if what == lackey_text.BAD:
                    raise self._error(f"an access such as ' L 1ffeffe7f8,8' expected, not {_shown(line)}")
                raise self._error(f"lines of text expected, not {_shown(line)}")
            if stop < 0:
                break
            if _SUPERBLOCK.match(line):
                self._skip(SUPERBLOCKS)
            elif (match := _BLANKS.match(line)) and 1 <= int(match[3]) <= 0xFFFF:
                if filled == self._room:
                    filled = self._put(filled)
                filled = self._add(filled, match)
            else:
                filled = self._put(filled)
                if what == lackey_text.OTHER:
                    self._other(line)
                elif self._lenient:
                    self._skip(OTHERS)
                else:
                    raise self._error(f"an access such as ' L 1ffeffe7f8,8' expected, not {_shown(line)}")
            self.lines += 1
            at = stop + 1
        self._put(filled)
        self._tail = text[at:]

    def _add(self, filled: int, match: re.Match[bytes]) -> int:
        self._op[filled], self._size[filled] = _KINDS[match[1]], int(match[3])
        self._addr[filled] = int(match[2], 16)
        return filled + 1

    def _put(self, filled: int) -> int:
        """Write the accesses that wait; there are none afterwards."""
        if filled:
            self._settle(False)
            self._open = None
            self.traced = True
            self._run(self._number)
            self._writer.write(op=self._op[:filled], size=self._size[:filled], addr=self._addr[:filled])
        return 0

    def _skip(self, what: str) -> None:
        self._writer.skipped[what] = self._writer.skipped.get(what, 0) + 1

    def end(self) -> None:
        """The text has ended; TraceError if that is in the middle of a line.

        A process that has called exec, and no more, is out of sight from there on: that is its end.
        """
        if self._tail.startswith(b"SYSCALL[") and b" sys_exec" in self._tail:
            self._other(self._tail.rstrip())
            self.lines += 1
            self._tail = b""
        if self._tail.strip():
            raise self._error(f"a whole line expected, not {_shown(self._tail)} and the end of the text")
        if self._open is not None and self._open[0] in _EXEC:
            self._event(Event.EXIT)

    # -- lines that are no accesses

    def _other(self, line: bytes) -> None:
        if self._open is not None:
            name, thread, args = self._open
            self._open = None
            if line.lstrip().startswith(b"-->"):
                self._call(name, thread, args, line)
                return
        if not _SAID.match(line) and not _MESSAGE.match(line):
            if self._lenient:
                self._skip(OTHERS)
                return
            expected = f"a line of lackey's with --trace-mem=yes expected, not {_shown(line)}"
            raise self._error(expected + ("" if not self.traced else "; --lenient skips what a program printed"))
        if _SAID.match(line):
            if match := _BANNER.match(line.lstrip()):
                self._banner(int(match["pid"]), match["text"])
            return
        if line.strip():
            self._settle(line.lstrip().startswith(b"-->"))
        image = _NEW_IMAGE.search(line, 1) if b"sys_exec" in line else None
        call = line[: image.start()] if image else line
        if match := _RESUMED.match(call):
            pending = self._pending.pop(match["pid"] + b"," + match["tid"], None)
            if pending is not None:
                self._result(*pending, match["end"])
        elif match := _CALL.match(call):
            self._of(int(match["pid"]))
            self.traced = True
            name = match["name"].decode().removeprefix("sys_").removeprefix("old_")
            self._call(name, match["pid"] + b"," + match["tid"], match["args"], match["args"])
        if image:
            self._follow(call, line[image.start() :])

    def _follow(self, call: bytes, line: bytes) -> None:
        """What a new program begins with, behind the call that made it."""
        self._open = None
        if match := _BANNER.match(line):
            self._banner(int(match["pid"]), match["text"])
        elif (match := _BLANKS.match(line)) and 1 <= int(match[3]) <= 0xFFFF:
            path = _PATH.search(call)
            self._image = path[1].decode("utf-8", "replace") if path else "a program"
            self._put(self._add(0, match))

    def _of(self, pid: int) -> None:
        if self.pid is None:
            self.pid = pid
        elif pid != self.pid:
            expected = f"lines of process {self.pid} alone expected, not of {pid}: use --log-file=NAME.%p"
            raise self._error(expected)

    def _banner(self, pid: int, text: bytes) -> None:
        self._of(pid)
        if text.startswith(b"Command: "):
            command = text[9:].decode("utf-8", "replace").replace("\\ ", " ")
            self._image = command
            self._writer.processes[self._number]["command"] = command

    def _settle(self, forked: bool) -> None:
        """What the text goes on with tells a new program from the child of a fork, whose own file begins like one."""
        if self._image is not None and not forked:
            self._pending.clear()
            self._event(Event.EXEC, file=self._image.split(" ", 1)[0])
        self._image = None

    def _call(self, name: str, thread: bytes, args: bytes, end: bytes) -> None:
        arguments, arrow, _ = args.partition(b"-->")
        if b"-->" not in end:
            if b"unimplemented" not in args:
                self._open = (name, thread, args)
            if name not in ("exit", "exit_group"):
                return
        if b"[async] ..." in end:
            self._pending[thread] = (name, arguments)
        else:
            self._result(name, arguments if arrow else args, end)

    def _result(self, name: str, args: bytes, end: bytes) -> None:
        """A system call that is done: what it changed in the address space becomes an event."""
        if name in ("exit", "exit_group"):
            # A thread's exit leaves the process: its address space goes with the last, or with exit_group.
            if name == "exit_group":
                self._event(Event.EXIT, other=self._numbers(args)[0] if self._numbers(args) else 0)
            return
        match = _SUCCESS.search(end)
        if match is None:
            return
        result = int(match[1], 16)
        numbers = self._numbers(args)
        if name in ("fork", "vfork", "clone", "clone3"):
            created = _CREATED.search(args) or _CREATED.search(end)
            flags = 0
            if name == "clone":
                # Valgrind prints the flags in hexadecimal, without the 0x.
                if (printed := _FLAGS.match(args)) is None:
                    raise self._error(f"the flags of clone, a hexadecimal number, expected, not {_shown(args)}")
                flags = int(printed[1], 16)
            if created is not None:
                self._event(Event.CLONE, other=self._child(int(created[1])), flags=flags & ~CLONE_VM)
            elif flags & CLONE_VM:
                self._event(Event.CLONE, other=self._number, flags=flags)
            return
        if name in ("open", "openat"):
            path = _PATH.search(args)
            if path is not None:
                self._files[result] = path[1].decode("utf-8", "replace")
            return
        wanted = {"mmap": 6, "mmap2": 6, "munmap": 2, "mprotect": 3, "mremap": 4, "madvise": 3, "brk": 1}.get(name)
        if wanted is None:
            return
        if len(numbers) < wanted:
            raise self._error(f"{wanted} numbers as arguments of {name} expected, not {_shown(args)}")
        if name in ("mmap", "mmap2"):
            fd = numbers[4] & 0xFFFFFFFF
            anonymous = numbers[3] & 0x20 or fd == 0xFFFFFFFF
            self._event(
                Event.MMAP,
                file=None if anonymous else self._files.get(fd, f"file {fd}"),
                addr=result,
                size=numbers[1],
                prot=numbers[2],
                flags=numbers[3],
                offset=0 if anonymous else numbers[5] << 12 if name == "mmap2" else numbers[5],
            )
        elif name == "munmap":
            self._event(Event.MUNMAP, addr=numbers[0], size=numbers[1])
        elif name == "mprotect":
            self._event(Event.MPROTECT, addr=numbers[0], size=numbers[1], prot=numbers[2])
        elif name == "mremap":
            self._event(Event.MREMAP, addr=result, size=numbers[2], other=numbers[0], offset=numbers[1])
        elif name == "madvise":
            self._event(Event.MADVISE, addr=numbers[0], size=numbers[1], flags=numbers[2])
        else:
            self._event(Event.BRK, addr=result)

    @staticmethod
    def _numbers(args: bytes) -> list[int]:
        numbers = []
        for part in args.rpartition(b")")[0].split(b",") if b")" in args else args.split(b","):
            word = part.strip(b" (").split(b"(")[0].strip()
            try:
                numbers.append(int(word, 0))
            except ValueError:
                break
        return numbers

    def _event(self, kind: Event, file: str | None = None, **fields: int) -> None:
        self._run(self._number)
        self._writer.event(kind, self._number, file, **fields)


def _shown(data: bytes) -> str:
    """The beginning of a line, in one line and in ASCII."""
    return ascii(data[:60].split(b"\n")[0].decode("latin-1"))


_FIRST_PID = re.compile(rb"(?:==|--)%b(\d{1,10})(?:==|--)|SYSCALL\[(\d{1,10})," % _TIME)
_FIRST = re.compile(
    rb"\s*((==|--)%b\d+(==|--) |SYSCALL\[\d+,\d+\]|--> \[|(I | ?[LSM]) +[0-9a-f]+,\d+\s*\n|SB [0-9a-f]{8,16}\s*\n)"
    % _TIME
)
_LACKEY = re.compile(rb"^==%b\d+== Lackey, an example Valgrind tool\r?$" % _TIME, re.M)


def matches(head: bytes) -> bool:
    """The first line is one of Valgrind's, or an access; or the tool's banner is among the lines of a program."""
    return _FIRST.match(head) is not None or _LACKEY.search(head) is not None


def read(
    paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None, lenient: bool = False
) -> None:
    """Each text is a process, or several: their processes follow one another in the recording."""
    processes = Processes(writer)
    for source in sources(paths, progress):
        with source:
            _read(source, writer, processes, lenient)


def _read(source: Source, writer: Writer, processes: Processes, lenient: bool) -> None:
    head = source.read()
    while len(head) < 1 << 12 and (more := source.read()):
        head += more
    found = _FIRST_PID.search(head[: 1 << 12])
    pid = int(found[1] or found[2]) if found else None
    number = processes.by_pid.get(pid) if pid is not None else None
    if number is None:
        number = processes.new(pid)
    elif "text" in writer.processes[number]:
        number = processes.new(None)
    writer.processes[number]["text"] = source.path
    parser = LackeyParser(
        writer,
        number,
        source.path,
        run=processes.run,
        child=lambda pid: processes.child(number, pid),
        lenient=lenient,
    )
    while head:
        parser.feed(head)
        head = source.read()
    parser.end()
    if not parser.lines:
        raise TraceError(source.path, 1, "a line of lackey's expected, the file is empty", "line")
    if not parser.traced:
        expected = "accesses or system calls expected, there are none: lackey prints them with --trace-mem=yes"
        raise TraceError(source.path, None, expected)
