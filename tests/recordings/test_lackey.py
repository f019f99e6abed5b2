"""The text of Valgrind's lackey: the parser of its accesses, and the recording that its system calls make of it."""

import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA

import shadowcore as sc
from shadowcore import recordings
from shadowcore.recording import importers, valgrind
from shadowcore.recording.importers import lackey_text as lackey
from shadowcore.recordings import FETCH, MODIFY, READ, WRITE, Event, Reader

DATA = DATA / "lackey"
TEXTS = [DATA / "parent.txt", DATA / "child.txt"]
LINE = re.compile(rb"(I | [LSM]) ([0-9a-fA-F]{1,16}),([0-9]{1,5})\n")
CODES = {b"I ": FETCH, b" L": READ, b" S": WRITE, b" M": MODIFY}


def parse(text, start=0, stop=None, room=100):
    arrays = [np.zeros(room, dtype=code) for code in ("u1", "u2", "u8")]
    at, filled, what = lackey.parse(text, start, len(text) if stop is None else stop, *arrays, 0)
    return at, list(zip(*(array[:filled].tolist() for array in arrays), strict=True)), what


def slow(text):
    """The same by a regular expression."""
    at, rows = 0, []
    while match := LINE.match(text, at):
        size = int(match[3])
        if not 0 < size < 1 << 16:
            break
        rows.append((CODES[match[1]], size, int(match[2], 16)))
        at = match.end()
    return at, rows


# -- the parser ------------------------------------------------------------------------------------------


def test_accesses_of_every_kind():
    text = b"I  04001100,3\n L 1ffeffe7f8,8\n S 0,1\n M ffffffffffffffff,65535\n"
    assert parse(text) == (
        len(text),
        [(FETCH, 3, 0x4001100), (READ, 8, 0x1FFEFFE7F8), (WRITE, 1, 0), (MODIFY, 65535, (1 << 64) - 1)],
        lackey.MORE,
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"==12== Lackey\n", lackey.OTHER),
        (b"SYSCALL[1,1](12) sys_brk ( 0x0 )\n", lackey.OTHER),
        (b" --> [pre-success] Success(0x0)\n", lackey.OTHER),
        (b"\x7fELF\0\0\0\0", lackey.OTHER),
        (b" X 04001100,3\n", lackey.OTHER),
        (b"I 004001100,3\n", lackey.OTHER),
        (b" L 04001100 3\n", lackey.BAD),
        (b" L 04001100,\n", lackey.BAD),
        (b" L 04001100,3x\n", lackey.BAD),
        (b" L 04001100,0\n", lackey.BAD),
        (b" L 04001100,65536\n", lackey.BAD),
        (b" L 04001100,000008\n", lackey.BAD),
        (b" L ,8\n", lackey.BAD),
        (b" L 12345678901234567,8\n", lackey.BAD),
        (b" L 0400g100,8\n", lackey.BAD),
        (b" L 04001100,8\r\n", lackey.BAD),
        (b" L 0400", lackey.MORE),
        (b" L 0400,", lackey.MORE),
        (b" L 0400,8", lackey.MORE),
        (b" ", lackey.MORE),
        (b"", lackey.MORE),
    ],
)
def test_what_stands_behind_the_accesses(line, what):
    good = b" L 1ffeffe7f8,8\n" * 3
    assert parse(good + line) == (len(good), [(READ, 8, 0x1FFEFFE7F8)] * 3, what)


def test_arrays_without_room_and_parts_of_a_text():
    text = b" L 10,8\n" * 5
    assert parse(text, room=3) == (24, [(READ, 8, 16)] * 3, lackey.FULL)
    assert parse(text, room=0) == (0, [], lackey.FULL)
    assert parse(text, 8, 24) == (24, [(READ, 8, 16)] * 2, lackey.MORE)
    assert parse(text, 8, 23) == (16, [(READ, 8, 16)], lackey.MORE)
    for start, stop in ((-1, 3), (4, 3), (0, 99)):
        with pytest.raises(ValueError, match="bytes"):
            parse(text, start, stop)
    with pytest.raises(ValueError, match="of one length"):
        lackey.parse(text, 0, 8, np.zeros(3, "u1"), np.zeros(2, "u2"), np.zeros(3, "u8"), 0)
    with pytest.raises(ValueError, match="filled"):
        lackey.parse(text, 0, 8, np.zeros(3, "u1"), np.zeros(3, "u2"), np.zeros(3, "u8"), 4)


PIECES = st.sampled_from([b"I  ", b" L ", b" S ", b" M ", b"0", b"1f", b",", b"8", b"\n", b" ", b"65535", b"ffffffff"])
LINES = st.tuples(
    st.sampled_from([b"I  ", b" L ", b" S ", b" M "]), st.integers(0, (1 << 64) - 1), st.integers(0, 70_000)
).map(lambda line: b"%b%08x,%d\n" % line)


@settings(max_examples=300)
@given(st.lists(PIECES | LINES | LINES, max_size=12).map(b"".join), st.integers(0, 20))
def test_as_a_regular_expression_has_it(text, cut):
    at, rows, what = parse(text)
    assert (at, rows) == slow(text)
    if at < len(text) and what == lackey.MORE:
        assert b"\n" not in text[at:]
        assert len(text) - at < 26
    # Whatever a text is cut at, its parts come to the same.
    stop = max(len(text) - cut, 0)
    middle, first, _ = parse(text, 0, stop)
    end, second, _ = parse(text, middle)
    assert (end, first + second) == (at, rows)


# -- recordings ------------------------------------------------------------------------------------------


def contents(path):
    """Events by process, their times as numbers of accesses of that process before; and the accesses."""
    events, accesses = {}, {}
    with Reader(path) as reader:
        for entry in reader.processes:
            number = entry["number"]
            events[number], accesses[number] = [], []
            for part in reader.process(number):
                if isinstance(part, tuple):
                    accesses[number] += zip(*(array.tolist() for array in part[1:]), strict=True)
                else:
                    fields = {
                        n: int(part[n]) for n in part.dtype.names if part[n] and n not in ("at", "process", "kind")
                    }
                    if "file" in fields:
                        fields["file"] = reader.files[fields["file"] - 1]
                    events[number].append((len(accesses[number]), Event(part["kind"]).name, fields))
        return events, accesses, reader


@pytest.fixture
def imported(tmp_path):
    importers.convert(TEXTS, tmp_path / "a.screc")
    return contents(tmp_path / "a.screc")


def test_system_calls_become_events(imported):
    """What tests/data/lackey/program.c asks of its kernel, in order."""
    events, _, reader = imported
    assert [event[1:] for event in events[0]] == [
        ("EXEC", {"file": "./program"}),
        ("BRK", {"addr": 0x4000000}),
        ("BRK", {"addr": 0x4002000}),
        ("MMAP", {"addr": 0x4800000, "size": 16384, "prot": 3, "flags": 0x22}),
        ("MREMAP", {"addr": 0x4800000, "size": 32768, "other": 0x4800000, "offset": 16384}),
        ("MADVISE", {"addr": 0x4800000, "size": 4096, "flags": 4}),
        ("MMAP", {"addr": 0x4808000, "size": 4096, "prot": 1, "flags": 2, "file": "/proc/self/exe"}),
        ("CLONE", {"other": 1}),
        ("MUNMAP", {"addr": 0x4800000, "size": 32768}),
        ("EXIT", {}),
    ]
    # The child of a fork has its parent's memory: it begins without an EXEC.
    assert [event[1:] for event in events[1]] == [
        ("MPROTECT", {"addr": 0x4800000, "size": 4096, "prot": 1}),
        ("EXIT", {"other": 7}),
    ]
    assert [entry["parent"] for entry in reader.processes] == [None, 0]
    assert reader.processes[1]["command"] == "./program"
    assert reader.complete
    assert reader.source == {"format": "lackey", "files": [str(path) for path in TEXTS]}


def test_accesses_are_all_there(imported):
    events, accesses, _ = imported
    for number, path in enumerate(TEXTS):
        expected = [slow(line)[1][0] for line in path.read_bytes().splitlines(keepends=True) if LINE.match(line)]
        assert accesses[number] == expected
    assert len(accesses[0]) == 97
    at = {event[1]: event[0] for event in events[0]}
    # The store to the heap that was just made, and the mapping that is touched.
    assert accesses[0][at["BRK"] :][1] == (WRITE, 1, 0x4000000)
    assert (WRITE, 1, 0x4802000) in accesses[1]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_parts_in_which_a_text_comes_do_not_matter(tmp_path, imported, size, monkeypatch):
    monkeypatch.setattr(importers.lackey, "ROOM", size)
    monkeypatch.setattr(importers.Source.read, "__defaults__", (size,))
    importers.convert(TEXTS, tmp_path / "b.screc", "lackey")
    assert contents(tmp_path / "b.screc")[:2] == imported[:2]


def text_of(tmp_path, text, name="text"):
    path = tmp_path / name
    path.write_bytes(text)
    return path


def events_of(tmp_path, *lines):
    path = text_of(tmp_path, b"".join(line.encode() + b"\n" for line in lines))
    importers.convert([path], tmp_path / "made.screc", "lackey")
    events, _, reader = contents(tmp_path / "made.screc")
    return [event[1:] for event in events[0]], reader


def test_calls_that_fail_change_nothing(tmp_path):
    events, _ = events_of(
        tmp_path,
        "SYSCALL[5,1](9) sys_mmap ( 0x0, 8192, 3, 34, 4294967295, 0 ) --> [pre-fail] Failure(0xc) ",
        "SYSCALL[5,1](334) unimplemented (by the kernel) syscall: 334! (ni_syscall)",
        " --> [pre-fail] Failure(0x26) ",
        "SYSCALL[5,1](2) sys_open ( 0x1(/x), 0 ) --> [async] ... ",
        "SYSCALL[5,2](11) sys_munmap ( 0x1000, 4096 )[sync] --> Success(0x0) ",
        "SYSCALL[5,1](2) ... [async] --> Failure(0x2) ",
        "SYSCALL[5,1](2) ... [async] --> Success(0x2) ",
        "",
    )
    assert events == [("MUNMAP", {"addr": 0x1000, "size": 4096})]


def test_calls_of_several_threads_are_told_apart(tmp_path):
    events, reader = events_of(
        tmp_path,
        "SYSCALL[5,1](257) sys_openat ( 4294967196, 0x4834(/lib/a (1), b.so), 524288 ) --> [async] ... ",
        "SYSCALL[5,2](257) sys_openat ( 4294967196, 0x4834(/lib/c.so), 524288 ) --> [async] ... ",
        "SYSCALL[5,1](257) ... [async] --> Success(0x3) ",
        "SYSCALL[5,2](257) ... [async] --> Success(0x4) ",
        "SYSCALL[5,2](9) sys_mmap ( 0x0, 16400, 1, 2050, 4, 4096 ) --> [pre-success] Success(0x4837000) ",
        "SYSCALL[5,1](9) sys_mmap ( 0x0, 16400, 1, 2050, 3, 0 ) --> [pre-success] Success(0x4937000) ",
        "SYSCALL[5,1](9) sys_mmap ( 0x0, 100, 1, 1, 77, 0 ) --> [pre-success] Success(0x4a37000) ",
    )
    assert [fields["file"] for _, fields in events] == ["/lib/c.so", "/lib/a (1), b.so", "file 77"]
    assert [fields.get("offset", 0) for _, fields in events] == [4096, 0, 0]
    assert len(reader.processes) == 1


def test_threads_and_processes(tmp_path):
    events, reader = events_of(
        tmp_path,
        "==5== Command: /bin/server --all",
        "I  00401000,2",
        "SYSCALL[5,1](56) sys_clone ( 3d0f00, 0x54, 0x54, 0x54, 0x54 ) --> [pre-success] Success(0x7) ",
        "SYSCALL[5,1](56) sys_clone ( 1200011, 0x0, 0x0, 0x4a27a10, 0x0 )   clone(fork): process 5 created child 8",
        " --> [pre-success] Success(0x8) ",
        "SYSCALL[5,2](60) exit( 0 ) --> [pre-success] Success(0x0) ",
        "SYSCALL[5,1](59) sys_execve ( 0x10a004(/bin/true), 0x1fff000410, 0x1fff0005e0 )==5== Lackey, an example",
        "==5== Command: /bin/true",
        "I  00401000,2",
        "SYSCALL[5,1](231) exit_group( 3 ) --> [pre-success] Success(0x0) ",
    )
    assert events == [
        ("EXEC", {"file": "/bin/server"}),
        ("CLONE", {"flags": 0x3D0F00}),
        ("CLONE", {"flags": 0x1200011, "other": 1}),
        ("EXEC", {"file": "/bin/true"}),
        ("EXIT", {"other": 3}),
    ]
    assert reader.processes[1] == {"number": 1, "pid": 8, "parent": 0}


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (b"", 1, "the file is empty"),
        (b" L 10,8\n L 10", 2, "a whole line expected, not ' L 10' and the end of the text"),
        (b" L 10,8\n L 10,x\n", 2, "an access such as ' L 1ffeffe7f8,8' expected, not ' L 10,x'"),
        (b" L 10,8\nhello\n", 2, "a line of lackey's with --trace-mem=yes expected, not 'hello'"),
        (b"\x7fELF\x02\x01\n" + bytes(100), 1, "a line of lackey's with --trace-mem=yes expected, not '\\x7fELF"),
        (bytes(1 << 17), 1, "lines of text expected, not '\\x00"),
        (
            b"==1== a\n L 10,8\nSYSCALL[2,1](12) sys_brk ( 0x0 ) --> [x] Success(0x0)\n",
            3,
            "process 1 alone expected, not of 2",
        ),
        (b"SYSCALL[2,1](9) sys_mmap ( 0x0 ) --> [x] Success(0x0)\n", 1, "6 numbers as arguments of mmap expected"),
    ],
)
def test_wrong_texts_are_named(tmp_path, text, line, expected):
    path = text_of(tmp_path, text)
    with pytest.raises(sc.TraceError) as caught:
        importers.convert([path], tmp_path / "out.screc", "lackey")
    assert (caught.value.file, caught.value.record) == (str(path), line)
    assert expected in caught.value.expected
    assert f"line {line}" in str(caught.value)
    assert "\n" not in str(caught.value)
    out = tmp_path / "out.screc"
    accesses = text.count(b" L 10,8\n")
    assert out.exists() == (accesses > 0)
    if accesses:
        assert "marked as incomplete" in str(caught.value)
        with Reader(out) as reader:
            assert (reader.complete, reader.records) == (False, accesses)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_texts_never_crash(tmp_path_factory, data):
    """Bytes of a good text changed, dropped, doubled: a recording, or a TraceError that names a line."""
    folder = tmp_path_factory.mktemp("damaged")
    text = bytearray(TEXTS[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        what = data.draw(st.sampled_from(["change", "drop", "double"]))
        if what == "change":
            text[at] = data.draw(st.integers(0, 255))
        else:
            end = min(at + data.draw(st.integers(1, 40)), len(text))
            text[at:end] = b"" if what == "drop" else text[at:end] * 2
    path = text_of(folder, bytes(text))
    try:
        importers.convert([path], folder / "out.screc", "lackey")
    except sc.TraceError as error:
        caught = error
    else:
        return
    assert caught.record >= 1
    assert caught.file == str(path)


def test_the_rate_is_not_that_of_an_interpreter(tmp_path):
    """Five million lines a second are asked for; a machine that is busy gets a third of it."""
    lines = b"I  04001100,3\n L 1ffeffe7f8,8\nI  04001103,5\n S 1ffeffe7f0,8\n" * 250_000
    path = text_of(tmp_path, lines)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        importers.convert([path], tmp_path / "out.screc", "lackey")
        best = max(best, 1_000_000 / (time.perf_counter() - start))
    assert best > 5e6 / 3


# -- under Valgrind itself -------------------------------------------------------------------------------

needs_valgrind = pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("program") / "program"
    flags = ["-O1", "-nostdlib", "-static", "-fno-stack-protector"]
    subprocess.run(["cc", *flags, DATA / "program.c", "-o", path], check=True)
    return path


@needs_valgrind
def test_a_program_is_recorded_with_its_child(tmp_path, program):
    """Parent and child write to one socket; they are told apart, and their calls are those of the samples."""
    writer = valgrind.record([str(program)], tmp_path / "a.screc")
    assert writer.complete
    events, accesses, reader = contents(tmp_path / "a.screc")
    assert [name for _, name, _ in events[0]] == (
        ["EXEC", "BRK", "BRK", "MMAP", "MREMAP", "MADVISE", "MMAP", "CLONE", "MUNMAP", "EXIT"]
    )
    assert [name for _, name, _ in events[1]] == ["MPROTECT", "EXIT"]
    assert events[1][1][2] == {"other": 7}
    assert reader.processes[0]["status"] == 0
    assert reader.source["command"] == [str(program)]
    assert len(accesses[0]) > 50 < len(accesses[0])
    assert (WRITE, 1) in {access[:2] for access in accesses[1]}


CLOSES = """
#include <sys/wait.h>
#include <unistd.h>
int main(void)
{
    if (fork() == 0) {
        for (int fd = 3; fd < 70000; fd++)
            close(fd);
        execl("/bin/true", "true", (char *)0);
    }
    return wait(0) < 0;
}
"""


@needs_valgrind
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_program_that_closes_its_files_is_recorded_to_its_end(tmp_path):
    """As daemons do, and subprocess: the recording must not be among what they can close."""
    (tmp_path / "closes.c").write_text(CLOSES)
    subprocess.run(["cc", "closes.c", "-o", "closes"], cwd=tmp_path, check=True)
    writer = valgrind.record([str(tmp_path / "closes")], tmp_path / "a.screc")
    commands = [process.get("command") for process in writer.processes]
    assert "/bin/true" in commands
    events, accesses, _ = contents_of(tmp_path / "a.screc", commands.index("/bin/true"))
    assert [name for _, name, _ in events][-1] == "EXIT"
    assert accesses > 100_000


def contents_of(path, number):
    events, count = [], 0
    with Reader(path) as reader:
        for part in reader.process(number):
            if isinstance(part, tuple):
                count += len(part[1])
            else:
                events.append((count, Event(part["kind"]).name, None))
    return events, count, None


def test_what_cannot_be_recorded(tmp_path, monkeypatch):
    with pytest.raises(sc.ConfigError, match="a program is needed"):
        valgrind.record([], tmp_path / "a.screc")
    with pytest.raises(sc.ConfigError, match=r"^valgrind: 'no-valgrind' is not installed here"):
        valgrind.record(["true"], tmp_path / "a.screc", valgrind="no-valgrind")
    with pytest.raises(sc.ConfigError, match="there is no program 'no-program'"):
        valgrind.record(["no-program"], tmp_path / "a.screc", valgrind="true")
    with pytest.raises(sc.TraceError, match="a program that Valgrind can run expected; it ended with status 1"):
        valgrind.record(["true"], tmp_path / "a.screc", valgrind="false")
    assert not list(tmp_path.iterdir())


@needs_valgrind
def test_an_interrupted_program_is_ended_and_what_it_did_is_kept(tmp_path, monkeypatch):
    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        recordings.Writer.__init__, "__kwdefaults__", {**recordings.Writer.__init__.__kwdefaults__, "block": 100}
    )
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        valgrind.record(["sleep", "1000"], tmp_path / "a.screc", progress=interrupt)
    assert time.perf_counter() - start < 60
    with Reader(tmp_path / "a.screc") as reader:
        assert not reader.complete
        assert reader.records >= 100
