"""Texts of lackey as its other options, shells and editors leave them: read, or refused at a line."""

import json
import re

import pytest
from commands import refused, run
from places import DATA
from program_recordings import rows_of

import shadowcore as sc
from shadowcore.recording import importers
from shadowcore.recordings import FETCH, MODIFY, READ, WRITE, Event, Reader

FILES = DATA / "odd-files"
ACCESS = re.compile(rb"(I | [LSM]) ([0-9a-f]+),(\d+)$", re.M)
CODES = {b"I ": FETCH, b" L": READ, b" S": WRITE, b" M": MODIFY}


def imported(tmp_path, text, lenient=False):
    (tmp_path / "text").write_bytes(text)
    writer = importers.convert([tmp_path / "text"], tmp_path / "out.screc", lenient=lenient)
    return rows_of(tmp_path / "out.screc"), writer.skipped


def accesses(rows):
    return [row[1:] for row in rows if len(row) == 4]


def expected(text):
    return [(CODES[m[1]], int(m[3]), int(m[2], 16)) for m in ACCESS.finditer(text)]


@pytest.mark.parametrize(
    "name", ["lackey-time-stamp.txt", "sb.txt", "v.txt", "lackey-exec-without-trace-children.txt", "mixed_stdout.txt"]
)
def test_every_access_of_a_file_is_there(name, tmp_path):
    text = (FILES / name).read_bytes()
    rows, _ = imported(tmp_path, text, lenient=name == "mixed_stdout.txt")
    lines = re.sub(rb"\)I  ", rb")\nI  ", text)  # what follows a call of exec
    assert accesses(rows) == expected(lines)


def test_banners_with_times_tell_process_and_command(tmp_path):
    rows, _ = imported(tmp_path, (FILES / "lackey-time-stamp.txt").read_bytes())
    assert rows[0] == (0, Event.EXEC, {"file": "/bin/true"})
    with Reader(tmp_path / "out.screc") as reader:
        assert (reader.processes[0]["pid"], reader.processes[0]["command"]) == (15040, "/bin/true")


def test_verbose_texts(tmp_path):
    """-v -v: what Valgrind says of itself, with its unwind tables, changes nothing, and is no sign of a new program."""
    text = b"""--5-- Valgrind options:
--5--    --tool=lackey
==5== Lackey, an example Valgrind tool
==5== Command: ./app
--5-- Reading syms from /usr/bin/app
0x7d: [0]={ 0(r1) { u  u  u  c128 u  u  c120 c160 u  u  u  u  c72 c80 c88 c96 c168 u  u  u  }
**5** a message of the program's
I  0421f3d8,8
--5-- REDIR: 0x4 (x) redirected to 0x5 (y)
 M 0421f3e0,4
"""
    rows, skipped = imported(tmp_path, text)
    assert rows == [(0, Event.EXEC, {"file": "./app"}), (0, FETCH, 8, 0x421F3D8), (0, MODIFY, 4, 0x421F3E0)]
    assert skipped == {}


def test_superblocks_are_skipped_and_counted(tmp_path):
    text = b"SB 0401ab70\nI  0401ab70,3\nSB 0401b7e7\n" * 50
    rows, skipped = imported(tmp_path, text)
    assert accesses(rows) == [(FETCH, 3, 0x401AB70)] * 50
    assert skipped == {"superblocks (--trace-superblocks)": 100}
    said = run("import", tmp_path / "text", "-o", tmp_path / "said.screc")
    assert said.splitlines()[1] == "skipped: superblocks (--trace-superblocks): 100"
    plain = json.loads(run("import", tmp_path / "text", "-o", tmp_path / "said.screc", "--json"))
    assert plain["skipped"] == skipped


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_ends_of_lines_of_another_system(tmp_path, size, monkeypatch):
    """CR LF, wherever the parts are cut in which a text comes."""
    monkeypatch.setattr(importers.Source.read, "__defaults__", (size,))
    text = (DATA / "lackey" / "parent.txt").read_bytes()
    plain, _ = imported(tmp_path, text)
    other, _ = imported(tmp_path, text.replace(b"\n", b"\r\n"))
    assert other == plain
    assert accesses(imported(tmp_path, (FILES / "crlf.txt").read_bytes())[0]) == [
        (FETCH, 8, 0x421F3D8),
        (READ, 8, 0x421F3E0),
    ]


@pytest.mark.parametrize("text", [b"  I  0421f3d8,8\n   L 0421f3e0,8\n", b"\n\n I  0421f3d8,8 \nL  0421f3e0,8\t\n"])
def test_blanks_before_and_behind(tmp_path, text):
    assert accesses(imported(tmp_path, text)[0]) == [(FETCH, 8, 0x421F3D8), (READ, 8, 0x421F3E0)]


def test_accesses_with_blanks_are_no_way_around_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr(importers.lackey, "ROOM", 4)
    text = b"I  10,1\nI  11,1\nI  12,1\nI  13,1\n  L 14,1\n  L 15,1\n S 16,1\n" * 3
    assert [row[2] for row in accesses(imported(tmp_path, text)[0])] == [16, 17, 18, 19, 20, 21, 22] * 3


# -- programs that print -------------------------------------------------------------------------------------


def test_what_a_program_printed_is_an_error_or_skipped(tmp_path):
    path = FILES / "mixed_stdout.txt"
    said = refused("import", path, "-o", tmp_path / "strict.screc")
    assert "line 6" in said
    assert "--lenient" in said
    assert "marked as incomplete" in said
    plain = json.loads(run("import", path, "-o", tmp_path / "out.screc", "--lenient", "--json"))
    assert (plain["records"], plain["complete"], plain["skipped"]) == (3, True, {"lines of others": 1})
    rows = rows_of(tmp_path / "out.screc")
    assert rows[0] == (0, Event.EXEC, {"file": "./app"})
    assert accesses(rows) == expected(path.read_bytes())


def test_lenient_takes_lines_that_are_nearly_accesses(tmp_path):
    text = b"I  10,1\n L 10,x\n S 10,70000\nhello L 10,1\n M 11,1\n"
    rows, skipped = imported(tmp_path, text, lenient=True)
    assert accesses(rows) == [(FETCH, 1, 0x10), (MODIFY, 1, 0x11)]
    assert skipped == {"lines of others": 3}


def test_what_was_printed_first_hides_no_text_of_lackeys(tmp_path):
    text = b"loading\n==5== Lackey, an example Valgrind tool\nI  10,1\n"
    rows, skipped = imported(tmp_path, text, lenient=True)
    assert accesses(rows) == [(FETCH, 1, 0x10)]
    assert skipped == {"lines of others": 1}
    with pytest.raises(sc.TraceError, match="line 1: a line of lackey's"):
        imported(tmp_path, text)


def test_lenient_is_for_texts(tmp_path):
    (tmp_path / "a.csv").write_text("kind,addr\nread,1\n")
    said = refused("import", tmp_path / "a.csv", "-o", tmp_path / "out.screc", "--lenient")
    assert "lackey, pinatrace, dinero" in said
    assert not (tmp_path / "out.screc").exists()


# -- programs that call exec ---------------------------------------------------------------------------------

CALL = b"SYSCALL[5,1](59) sys_execve ( 0x4035d48(/usr/bin/ls), 0x129920, 0x4035c08 )"


@pytest.mark.parametrize("end", [b"", b" ", b"\n"])
def test_exec_out_of_sight_is_the_end_of_a_process(tmp_path, end):
    rows, _ = imported(tmp_path, b"==5== Command: sh\nI  10,1\n" + CALL + end)
    assert rows == [(0, Event.EXEC, {"file": "sh"}), (0, FETCH, 1, 16), (0, Event.EXIT, {})]
    with Reader(tmp_path / "out.screc") as reader:
        assert reader.complete


@pytest.mark.parametrize("banner", [b"", b"==5== Lackey, an example\n==5== Command: /usr/bin/ls\n"])
def test_exec_in_sight_is_a_new_program(tmp_path, banner):
    """Without a banner too, which Valgrind does not print with -q."""
    rows, _ = imported(tmp_path, b"I  10,1\n" + CALL + banner + b"I  20,1\n L 21,1\n")
    assert rows == [(0, FETCH, 1, 16), (0, Event.EXEC, {"file": "/usr/bin/ls"}), (0, FETCH, 1, 32), (0, READ, 1, 33)]


def test_exec_that_fails_is_nothing(tmp_path):
    rows, _ = imported(tmp_path, b"I  10,1\n" + CALL + b"\n --> [pre-fail] Failure(0x2)\nI  11,1\n")
    assert rows == [(0, FETCH, 1, 16), (0, FETCH, 1, 17)]


def test_any_other_call_is_cut(tmp_path):
    with pytest.raises(sc.TraceError, match="line 2: a whole line expected"):
        imported(tmp_path, b"I  10,1\nSYSCALL[5,1](12) sys_brk ( 0x0 )")
