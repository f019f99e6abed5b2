"""Recordings from other tools' files: .npz recordings of guests, Valgrind's lackey, ChampSim, CSV. All are streamed.

Lackey's text, ChampSim's instructions and CSV become recordings of programs: see shadowcore.recordings.Event.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ... import npy
from ...errors import ConfigError, TraceError
from ...files import check_path
from ...recording import guest as recording
from ..format import FETCH, GUEST, MODIFY, PROGRAM, READ, WRITE, Event, Writer
from . import lackey_text as lackey

__all__ = [
    "CHAMPSIM_DTYPE",
    "CSV_COLUMNS",
    "FORMATS",
    "convert",
    "guess",
]

Progress = Callable[[int, int], None]
"""Called now and then with bytes of input done, and of all, 0 where that is not known."""

FORMATS = ("linux", "lackey", "champsim", "csv")
CHUNK = 1 << 20
LINE_MAX = 1 << 16
"""Bytes of the longest line of a text."""

CHAMPSIM_DTYPE = np.dtype(
    [
        ("ip", "<u8"),
        ("is_branch", "u1"),
        ("branch_taken", "u1"),
        ("destination_registers", "u1", 2),
        ("source_registers", "u1", 4),
        ("destination_memory", "<u8", 2),
        ("source_memory", "<u8", 4),
    ]
)
"""An instruction of a ChampSim trace."""

_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


# -- input -----------------------------------------------------------------------------------------------


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
        """Up to so many bytes, none at the end; TraceError if the compressed data are damaged or cut short."""
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


def guess(path: str | os.PathLike[str]) -> str:
    """The format of a file, by its contents; TraceError if it has none of those that are known."""
    with Source(path) as source:
        head = source.read(1 << 16)
    if head[:4] == b"PK\x03\x04" and _holds_a_guest(path):
        return "linux"
    if re.match(rb"(==\d+== |SYSCALL\[\d+,\d+\]|(I | [LSM]) [0-9a-f]+,\d+\n)", head):
        return "lackey"
    first = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    if "," in first and set(map(str.strip, first.split(","))) <= set(CSV_COLUMNS) and "addr" in first:
        return "csv"
    rows = np.frombuffer(head[: len(head) // 64 * 64], CHAMPSIM_DTYPE)
    if len(rows) and not _odd_instructions(rows).any() and _addresses(rows):
        return "champsim"
    raise TraceError(path, None, f"a file of one of the formats {', '.join(FORMATS)} expected, this looks like none")


def _holds_a_guest(path: str | os.PathLike[str]) -> bool:
    """A zip archive is a recording: its members are those of one. Others are no input."""
    try:
        with zipfile.ZipFile(check_path(path)) as archive:
            return bool({"kind.npy", "recording.json"} & set(archive.namelist()))
    except npy.UNREADABLE:
        return True  # damaged: whoever reads it as a recording says how


# -- lackey ----------------------------------------------------------------------------------------------

_CALL = re.compile(
    rb"SYSCALL\[(?P<pid>\d{1,10}),(?P<tid>\d+)\]\(\s*\d+\) (?P<name>(?:sys_|old_)?\w+) ?\((?P<args>.*)$", re.S
)
_RESUMED = re.compile(rb"SYSCALL\[(?P<pid>\d+),(?P<tid>\d+)\]\(\s*\d+\) +\.\.\. \[async\] --> (?P<end>.*)$", re.S)
_CREATED = re.compile(rb"process \d+ created child (\d{1,10})\b")
_SUCCESS = re.compile(rb"Success\((0x[0-9a-fA-F]{1,16})\)")
_FLAGS = re.compile(rb"[\s(]*([0-9a-fA-F]{1,16})\s*[,)]")
_BANNER = re.compile(rb"==(?P<pid>\d{1,10})== (?P<text>.*)$")
_MESSAGE = re.compile(rb"(==|--|\*\*)\d+(==|--|\*\*)|SYSCALL\[|\s+--> \[| *--> |\s*$")
_PATH = re.compile(rb"0x[0-9a-fA-F]+\((.*)\),")
_NEW_IMAGE = re.compile(rb"==\d+== ")
CLONE_VM = 0x100


class LackeyParser:
    """The text that one process prints under lackey, as it comes, into a recording of a program.

    writer: where the accesses and events go. number: of the process in it. name: of the text, for errors.
    run: called before anything is written for the process.  child: called with the pid of a new process, returns its
    number.
    """

    def __init__(
        self,
        writer: Writer,
        number: int,
        name: object,
        *,
        run: Callable[[int], None],
        child: Callable[[int], int],
    ) -> None:
        self.lines = 0
        self.traced = False  # there was an access or a system call: messages alone are what every tool prints
        self.pid: int | None = None
        self._image: str | None = None  # a command whose program may be new
        self._writer, self._number, self._name = writer, number, name
        self._run, self._child = run, child
        self._tail = b""
        self._room = CHUNK // 4
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
        at, end = 0, len(text)
        while True:
            at, filled, what = lackey.parse(text, at, end, self._op, self._size, self._addr, 0)
            if filled:
                self._settle(False)
                self.lines += filled
                self.traced = True
                self._run(self._number)
                self._writer.write(op=self._op[:filled], size=self._size[:filled], addr=self._addr[:filled])
            if what == lackey.FULL:
                continue
            if what == lackey.BAD:
                raise self._error(f"an access such as ' L 1ffeffe7f8,8' expected, not {_shown(text[at : at + 60])}")
            if what == lackey.MORE:
                break
            stop = text.find(b"\n", at, at + LINE_MAX)
            if stop < 0:
                if end - at >= LINE_MAX:
                    raise self._error(f"lines of text expected, not {_shown(text[at : at + 60])}")
                break
            self._other(text[at:stop])
            self.lines += 1
            at = stop + 1
        self._tail = text[at:]

    def end(self) -> None:
        """The text has ended; TraceError if that is in the middle of a line."""
        if self._tail:
            raise self._error(f"a whole line expected, not {_shown(self._tail)} and the end of the text")

    # -- lines that are no accesses

    def _other(self, line: bytes) -> None:
        if self._open is not None:
            name, thread, args = self._open
            self._open = None
            if line.lstrip().startswith(b"-->"):
                self._call(name, thread, args, line)
                return
        if not _MESSAGE.match(line):
            expected = f"a line of lackey's with --trace-mem=yes expected, not {_shown(line)}"
            raise self._error(expected)
        if not line.startswith(b"=="):
            self._settle(line.lstrip().startswith(b"-->"))
        # After an exec the new program's first line follows the call without an end of the line.
        image = _NEW_IMAGE.search(line, 1) if b"sys_exec" in line else None
        call, banner = (line[: image.start()], line[image.start() :]) if image else (line, line)
        if match := _BANNER.match(banner):
            self._banner(int(match["pid"]), match["text"])
        if match := _RESUMED.match(call):
            pending = self._pending.pop(match["pid"] + b"," + match["tid"], None)
            if pending is not None:
                self._result(*pending, match["end"])
        elif match := _CALL.match(call):
            self._of(int(match["pid"]))
            self.traced = True
            name = match["name"].decode().removeprefix("sys_").removeprefix("old_")
            self._call(name, match["pid"] + b"," + match["tid"], match["args"], match["args"])

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


class Processes:
    """The processes of a recording, by number, and which of them runs."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.by_pid: dict[int, int] = {}
        self.running: int | None = None

    def new(self, pid: int | None, parent: int | None = None, **more: Any) -> int:
        """Note a process in the recording's header, with `more` said of it; its number."""
        number = len(self.writer.processes)
        self.writer.processes.append({"number": number, "pid": pid, "parent": parent, **more})
        if pid is not None:
            self.by_pid[pid] = number
        return number

    def run(self, number: int) -> None:
        """From here on process `number` runs."""
        if number != self.running:
            self.writer.event(Event.RUN, number)
            self.running = number

    def child(self, parent: int, pid: int) -> int:
        """The number of a process that `parent` made, which may have been met already."""
        number = self.by_pid.get(pid)
        if number is None:
            return self.new(pid, parent)
        self.writer.processes[number]["parent"] = parent
        return number


_FIRST_PID = re.compile(rb"==(\d{1,10})==|SYSCALL\[(\d{1,10}),")


def import_lackey(paths: Sequence[str | os.PathLike[str]], writer: Writer, *, progress: Progress | None = None) -> None:
    """Texts of lackey, one a process, into a recording of a program. Their processes follow one another in it."""
    processes = Processes(writer)
    total = _total(paths)
    done = 0
    for path in paths:
        with Source(path, progress, done, total) as source:
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
            writer.processes[number]["text"] = os.fspath(path)
            parser = LackeyParser(
                writer,
                number,
                path,
                run=processes.run,
                child=lambda pid, parent=number: processes.child(parent, pid),  # type: ignore[misc]
            )
            while head:
                parser.feed(head)
                head = source.read()
            parser.end()
            if not parser.lines:
                raise TraceError(path, 1, "a line of lackey's expected, the file is empty", "line")
            if not parser.traced:
                expected = "accesses or system calls expected, there are none: lackey prints them with --trace-mem=yes"
                raise TraceError(path, None, expected)
        done += _size(path)


# -- ChampSim --------------------------------------------------------------------------------------------


def import_champsim(
    paths: Sequence[str | os.PathLike[str]], writer: Writer, *, progress: Progress | None = None
) -> None:
    """ChampSim's traces, one a process. Each instruction is fetched, then its operands are read, then written.

    The traces have no sizes: fetches and accesses are of one byte. An operand of address 0 is none. Traces of another
    layout, such as CloudSuite's of 96 bytes an instruction, are told by what can be no instruction.
    """
    processes = Processes(writer)
    total, done = _total(paths), 0
    for path in paths:
        number = processes.new(None, text=os.fspath(path))
        processes.run(number)
        position = 0
        with Source(path, progress, done, total) as source:
            rest = b""
            while data := source.read(CHUNK):
                data = rest + data
                whole = len(data) // CHAMPSIM_DTYPE.itemsize
                rest = data[whole * CHAMPSIM_DTYPE.itemsize :]
                rows = np.frombuffer(data, CHAMPSIM_DTYPE, whole)
                bad = np.flatnonzero(_odd_instructions(rows))
                if len(bad):
                    _champsim(rows[: bad[0]], writer)
                    raise TraceError(
                        path,
                        position + int(bad[0]),
                        "an instruction of 64 bytes expected, whose branch flags are 0 or 1 and whose address is not 0 "
                        "(CloudSuite's, of 96 bytes, are not read)",
                    )
                _champsim(rows, writer)
                position += whole
            if rest:
                raise TraceError(
                    path, position, f"an instruction of 64 bytes expected, the trace ends after {len(rest)}"
                )
            if not position:
                raise TraceError(path, 0, "an instruction of 64 bytes expected, the trace is empty")
        done += _size(path)


_CHAMPSIM_OPS = np.array([FETCH] + [READ] * 4 + [WRITE] * 2, dtype=np.uint8)


def _odd_instructions(rows: Any) -> Any:
    """For each row, whether it can be no instruction."""
    return (rows["is_branch"] > 1) | (rows["branch_taken"] > 1) | (rows["ip"] == 0)


def _addresses(rows: Any) -> bool:
    """What should be addresses may be: none is in the lowest page, where nothing is mapped, but for 0 as no operand."""
    operands = (rows[name].reshape(-1) for name in ("source_memory", "destination_memory"))
    addresses = (rows["ip"], *(each[each != 0] for each in operands))
    return all(bool((each >= 1 << 12).all()) for each in addresses)


def _champsim(rows: Any, writer: Writer) -> None:
    addr = np.empty((len(rows), 7), dtype=np.uint64)
    addr[:, 0], addr[:, 1:5], addr[:, 5:] = rows["ip"], rows["source_memory"], rows["destination_memory"]
    there = addr != 0
    there[:, 0] = True
    writer.write(op=np.broadcast_to(_CHAMPSIM_OPS, addr.shape)[there], size=1, addr=addr[there])


# -- CSV -------------------------------------------------------------------------------------------------

CSV_COLUMNS = ("kind", "process", "addr", "size", "prot", "flags", "file", "offset", "other")
"""Columns that a CSV may have; the first line names them."""
_CSV_ACCESS = {"read": READ, "write": WRITE, "fetch": FETCH, "modify": MODIFY}
_CSV_EVENT = {event.name.lower(): event for event in Event if event is not Event.RUN}
_CSV_LIMITS = {"process": 1 << 32, "prot": 1 << 32}


def import_csv(paths: Sequence[str | os.PathLike[str]], writer: Writer, *, progress: Progress | None = None) -> None:
    """CSVs with a line of names and a line for each access or event; numbers as C writes them. See CSV_COLUMNS."""
    total, done = _total(paths), 0
    processes = Processes(writer)
    for path in paths:
        with Source(path, progress, done, total) as source:
            _csv(path, source, writer, processes)
        done += _size(path)


def _csv(path: Any, source: Source, writer: Writer, processes: Processes) -> None:
    rows = csv.reader(_lines(path, source), strict=True)
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
        limit = _CSV_LIMITS.get(name, 1 << 64)
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
            if kind in _CSV_ACCESS:
                size = values.get("size", 1)
                if "addr" not in values or not 1 <= size <= 0xFFFF:
                    raise TraceError(path, record, f"an addr, and a size from 1 to 65535, expected, not {size}", "line")
                accesses.append((_CSV_ACCESS[kind], size, values["addr"]))
                if len(accesses) >= 1 << 14:
                    flush()
            elif kind in _CSV_EVENT:
                flush()
                writer.event(_CSV_EVENT[kind], process, file, **values)
            else:
                known = ", ".join([*_CSV_ACCESS, *_CSV_EVENT])
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


def _lines(path: Any, source: Source) -> Iterator[str]:
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
            raise TraceError(path, count + data.count(b"\n", 0, wrong), "lines of text in UTF-8 expected", "line")
        count += text.count("\n")
        if len(tail) > LINE_MAX:
            raise TraceError(path, count, f"lines of text expected, of {LINE_MAX} bytes at most", "line")
        yield from io.StringIO(text, newline="")
        if not new:
            return


# -- guests ----------------------------------------------------------------------------------------------


def import_linux(path: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Writer:
    """A recording of a guest from an .npz file. Its arrays are read as wholes: the format allows nothing else."""
    loaded = recording.load(path)
    guest = {name: getattr(loaded, name) for name in ("cr0", "cr4", "efer", "nframes")}
    with Writer(out, GUEST, guest=guest, **options) as writer:
        writer.write(**loaded.arrays)
        writer.close(complete=loaded.complete)
    return writer


# -- all of them -----------------------------------------------------------------------------------------


def _size(path: str | os.PathLike[str]) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _total(paths: Iterable[str | os.PathLike[str]]) -> int:
    return sum(map(_size, paths))


_IMPORTERS = {"lackey": import_lackey, "champsim": import_champsim, "csv": import_csv}


def convert(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    format: str = "auto",
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> Writer:
    """Files of one format into the recording `out`. Several become several processes.

    format: "linux", "lackey", "champsim", "csv", or "auto": by the contents of the first file.
    name: what reports call it (None: as the first file). Returns the writer, closed: its records, its processes.
    TraceError names file, record or line, and cause; what was read before is kept, marked as incomplete.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format: one of auto, {', '.join(FORMATS)} is needed, not {format!r}")
    if isinstance(paths, (str, bytes, os.PathLike)) or not paths:
        raise ConfigError("paths: a sequence of at least one file is needed")
    paths, out = [check_path(path) for path in paths], check_path(out, "out")
    for path in paths:
        for made in (out, f"{out}.partial"):
            if os.path.exists(made) and os.path.exists(path) and os.path.samefile(path, made):
                raise ConfigError(f"out: another file than {path} is needed")
    kind = guess(paths[0]) if format == "auto" else format
    title = Path(paths[0]).name.split(".")[0] if name is None else name
    source = {"format": kind, "files": [os.fspath(path) for path in paths]}
    if kind == "linux":
        if len(paths) > 1:
            raise ConfigError("paths: one recording of a guest is needed, not several")
        return import_linux(paths[0], out, name=title, source=source)
    with kept(out), Writer(out, PROGRAM, name=title, source=source) as writer:
        _IMPORTERS[kind](paths, writer, progress=progress)
    return writer


@contextmanager
def kept(out: str | os.PathLike[str]) -> Iterator[None]:
    """Add to a TraceError of the input what has become of the output."""
    before = _stamp(out)
    try:
        yield
    except TraceError as error:
        if error.file == os.fspath(out) or _stamp(out) == before:
            raise
        expected = f"{error.expected}; {os.fspath(out)} has what comes before, marked as incomplete"
        raise TraceError(error.file, error.record, expected, error.unit) from None


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
