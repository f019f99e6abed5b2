"""Importers of ChampSim's traces, CSV and .npz recordings; and the commands record, import and info."""

import gzip
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from commands import COMMAND, ENVIRONMENT, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DATA
from program_recordings import rows_of

import shadowcore as sc
from shadowcore.recording import importers
from shadowcore.recording import replay as trace
from shadowcore.recording.importers import CHAMPSIM_DTYPE
from shadowcore.recordings import FETCH, READ, WRITE, Event, Reader, Writer

LACKEY = DATA / "lackey"


# -- ChampSim --------------------------------------------------------------------------------------------


def instructions(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, CHAMPSIM_DTYPE)
    rows["ip"] = 0x400000 + 4 * rng.integers(0, 1000, count)
    rows["is_branch"], rows["branch_taken"] = rng.integers(0, 2, (2, count))
    for name, shape in (("source_memory", 4), ("destination_memory", 2)):
        there = rng.integers(0, 4, (count, shape)) == 0
        rows[name] = there * rng.integers(1, 1 << 47, (count, shape))
    return rows


def test_an_instruction_has_64_bytes():
    assert CHAMPSIM_DTYPE.itemsize == 64
    assert CHAMPSIM_DTYPE.fields["destination_memory"][1] == 16
    assert CHAMPSIM_DTYPE.fields["source_memory"][1] == 32


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_champsim(tmp_path, suffix, pack):
    rows = instructions(5000)
    path = tmp_path / f"trace.champsim{suffix}"
    path.write_bytes(pack(rows.tobytes()))
    expected = []
    for row in rows:
        expected.append((0, FETCH, 1, int(row["ip"])))
        expected += [(0, READ, 1, int(addr)) for addr in row["source_memory"] if addr]
        expected += [(0, WRITE, 1, int(addr)) for addr in row["destination_memory"] if addr]
    assert json.loads(run("import", path, "-o", tmp_path / "out.screc", "--json"))["records"] == len(expected)
    assert rows_of(tmp_path / "out.screc") == expected


def test_several_traces_are_several_processes(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}").write_bytes(instructions(100, n).tobytes())
    importers.convert([tmp_path / f"{n}" for n in range(3)], tmp_path / "out.screc", "champsim", name="three")
    with Reader(tmp_path / "out.screc") as reader:
        assert reader.name == "three"
        assert [entry["text"] for entry in reader.processes] == [str(tmp_path / f"{n}") for n in range(3)]
        for n in range(3):
            fetched = [part[3][part[1] == FETCH] for part in reader.process(n)]
            assert (np.concatenate(fetched) == instructions(100, n)["ip"]).all()


@pytest.mark.parametrize(
    ("data", "record", "expected"),
    [
        (b"", 0, "the trace is empty"),
        (instructions(9).tobytes()[:-10], 8, "the trace ends after 54"),
        (instructions(9).tobytes() + bytes([9] * 64), 9, "branch flags are 0 or 1"),
        (lzma.compress(instructions(2000).tobytes())[:-3000], None, "whole compressed data expected"),
        (gzip.compress(instructions(2000).tobytes())[:-3000], None, "whole compressed data expected"),
        (gzip.compress(instructions(200).tobytes())[:-9] + b"damaged!!", None, "whole compressed data expected"),
    ],
)
def test_wrong_champsim_traces_are_named(tmp_path, data, record, expected):
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(sc.TraceError) as caught:
        importers.convert([path], tmp_path / "out.screc", "champsim")
    assert (caught.value.file, caught.value.record) == (str(path), record)
    assert expected in caught.value.expected
    assert expected in refused("import", path, "-o", tmp_path / "out2.screc", "--format", "champsim")


# -- CSV -------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    path = tmp_path / "made.csv"
    path.write_text(
        "kind,process,addr,size,prot,flags,file,other\n"
        "exec,0,0,,,,/bin/a,\n"
        "mmap,0,0x10000,8192,3,0x22,,\n"
        "read, 0, 0x10000, 8,,,,\n"
        "WRITE,0,65544,4,,,,\n"
        "\n"
        "clone,0,0,,,0,,1\n"
        'mmap,1,0x20000,4096,1,2,"/lib/a, b.so",\n'
        "fetch,1,0x400000,,,,,\n"
        "modify,0,0x10010,2,,,,\n"
        "exit,1,0,,,,,3"
    )
    run("import", path, "-o", tmp_path / "out.screc")
    assert rows_of(tmp_path / "out.screc") == [
        (0, Event.EXEC, {"file": "/bin/a"}),
        (0, Event.MMAP, {"addr": 0x10000, "size": 8192, "prot": 3, "flags": 0x22}),
        (0, 0, 8, 0x10000),
        (0, 1, 4, 0x10008),
        (0, Event.CLONE, {"other": 1}),
        (1, Event.MMAP, {"addr": 0x20000, "size": 4096, "prot": 1, "flags": 2, "file": "/lib/a, b.so"}),
        (1, 2, 1, 0x400000),
        (0, 3, 2, 0x10010),
        (1, Event.EXIT, {"other": 3}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfkind,addr\nread,0x1000\nwrite,8192\n",
        b'"kind","addr"\n"read","0x1000"\n"write","8192"\n',
        b'\xef\xbb\xbf"addr", "kind"\r\n0X1000,read\r\n0o20000,write\r\n',
        b",kind,addr\n0,read,4096\n1,write,8192\n",
        b"index,kind,addr\n0,read,4096\n1,write,8192\n",
        b"Unnamed: 0.1,Unnamed: 0,kind,addr\nx,0,read,4096\ny,1,write,8192\n".replace(b"0.1", b"1"),
    ],
)
def test_csv_of_spreadsheets_and_pandas(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text)
    importers.convert([tmp_path / "a.csv"], tmp_path / "out.screc")
    assert rows_of(tmp_path / "out.screc") == [(0, READ, 1, 0x1000), (0, WRITE, 1, 0x2000)]


@pytest.mark.parametrize(
    ("number", "form"),
    [
        ("7ffe10", ": hexadecimal is written 0x7ffe10"),
        ("FFh", ": hexadecimal is written 0xFF"),
        ("010", ": decimal is written 10, hexadecimal 0x10, octal 0o10"),
        ("09", ": decimal is written 9, hexadecimal 0x9"),
        ("4096.0", ": whole numbers are written 4096"),
        ("one", ""),
    ],
)
def test_csv_says_how_a_number_is_written(tmp_path, number, form):
    (tmp_path / "a.csv").write_text(f"kind,addr\nread,{number}\n")
    with pytest.raises(sc.TraceError) as caught:
        importers.convert([tmp_path / "a.csv"], tmp_path / "out.screc")
    assert caught.value.expected.endswith(f"expected, not {number!r}{form}")


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "a first line that names columns"),
        ("kind,size\nread,1", 1, "a first line that names columns"),
        ("kind,addr,colour\n", 1, "a first line that names columns"),
        ("kind,addr,addr\n", 1, "a first line that names columns"),
        ("kind,addr\nread,1\nread", 3, "2 fields expected, not 1"),
        ("kind,addr\nread,one\n", 2, "a number addr from 0 to 0xffffffffffffffff expected, not 'one'"),
        ("kind,addr\nread,-1\n", 2, "a number addr from 0"),
        ("kind,addr\nread,0x10000000000000000\n", 2, "a number addr from 0"),
        ("kind,addr\nread,\n", 2, "an addr, and a size from 1"),
        ("kind,addr,size\nread,1,0\n", 2, "an addr, and a size from 1 to 65535, expected, not 0"),
        ("kind,addr\nrun,1\n", 2, "a kind of read, write, fetch, modify, exec"),
        ("kind,addr\ndance,1\n", 2, "not 'dance'"),
        ("kind,addr,process\nread,1,0\nread,1,2\n", 3, "process 1 expected before process 2"),
        ('kind,addr\nread,"1\n', 2, "comma-separated values expected"),
        ("kind,addr\nread,\0\n", 2, "lines of text"),
        (b"kind,addr\nread,\xff\n", 2, "lines of text in UTF-8"),
        ("kind,addr\nread," + "1" * 70_000, 2, "lines of text"),
    ],
)
def test_wrong_csv_is_named(tmp_path, text, line, expected):
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(sc.TraceError) as caught:
        importers.convert([path], tmp_path / "out.screc", "csv")
    assert (caught.value.file, caught.value.record, caught.value.unit) == (str(path), line, "line")
    assert expected in caught.value.expected
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([*importers.FORMATS, "auto"]))
def test_any_bytes_are_refused_or_read(tmp_path_factory, data, form):
    folder = tmp_path_factory.mktemp("any")
    (folder / "file").write_bytes(data)
    try:
        importers.convert([folder / "file"], folder / "out", form)
    except sc.TraceError as error:
        caught = error
    else:
        with Reader(folder / "out") as reader:
            assert reader.complete
        return
    assert caught.file == str(folder / "file")


# -- which format ----------------------------------------------------------------------------------------


def test_formats_are_guessed_by_contents(tmp_path):
    trace.load().head(100).save(tmp_path / "guest.npz")
    (tmp_path / "a.csv").write_text("kind,addr\nread,1\n")
    (tmp_path / "t").write_bytes(instructions(10).tobytes())
    (tmp_path / "t.xz").write_bytes(lzma.compress(instructions(10).tobytes()))
    (tmp_path / "l.gz").write_bytes(gzip.compress((LACKEY / "parent.txt").read_bytes()))
    (tmp_path / "bare").write_text(" L 1ffe,8\n")
    for name, form in {
        "guest.npz": "linux",
        "a.csv": "csv",
        "t": "champsim",
        "t.xz": "champsim",
        "l.gz": "lackey",
        "bare": "lackey",
    }.items():
        assert importers.guess(tmp_path / name) == form
        importers.convert([tmp_path / name], tmp_path / "out.screc")
        with Reader(tmp_path / "out.screc") as reader:
            assert reader.source["format"] == form
            assert reader.records > 0
    for content in (b"", b"what is this?\n", bytes(64), os.urandom(30)):
        (tmp_path / "unknown").write_bytes(content)
        assert "this looks like none" in refused("import", tmp_path / "unknown", "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_guests_keep_every_record(tmp_path):
    short = trace.load().head(70_000)
    short.save(tmp_path / "guest.npz")
    assert "70,000 records of a guest" in run("import", tmp_path / "guest.npz", "-o", tmp_path / "guest.screc")
    again = trace.load(tmp_path / "guest.screc")
    assert all((array == again.arrays[name]).all() for name, array in short.arrays.items())
    assert (again.cr0, again.cr4, again.efer, again.nframes) == (short.cr0, short.cr4, short.efer, short.nframes)


def test_what_cannot_be_imported(tmp_path):
    (tmp_path / "a.csv").write_text("kind,addr\nread,1\n")
    same = tmp_path / "a.csv"
    assert "another file than" in refused("import", same, "-o", same)
    assert "No such file" in refused("import", tmp_path / "none", "-o", tmp_path / "out")
    assert "directory" in refused("import", tmp_path, "-o", tmp_path / "out")
    assert "Missing argument" in refused("import", "-o", tmp_path / "out")
    assert "Missing option" in refused("import", same)
    assert "'music'" in refused("import", same, "-o", tmp_path / "out", "--format", "music")
    assert "No such file" in refused("import", same, "-o", tmp_path / "none" / "out")
    assert "No space left" in refused("import", same, "-o", "/dev/full")
    with pytest.raises(sc.ConfigError, match="at least one file"):
        importers.convert([], tmp_path / "out")
    with pytest.raises(sc.ConfigError, match="format"):
        importers.convert([same], tmp_path / "out", "music")
    assert same.read_text() == "kind,addr\nread,1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


# -- info ------------------------------------------------------------------------------------------------


def test_info_of_a_program(tmp_path):
    out = tmp_path / "a.screc"
    run("import", LACKEY / "parent.txt", LACKEY / "child.txt", "-o", out, "--name", "sample")
    text = run("info", out)
    assert "sample" in text
    assert "./program" in text
    plain = json.loads(run("info", out, "--check", "--json"))
    assert (plain["stream"], plain["records"], plain["blocks"], plain["complete"]) == ("program", 111, 1, True)
    counts = plain["counts"]
    assert sum(counts[name] for name in ("read", "write", "fetch", "modify")) == 111
    assert (counts["mmap"], counts["clone"], counts["exit"], counts["brk"]) == (2, 1, 2, 2)
    assert [entry["pid"] is not None for entry in plain["processes"]] == [True, True]


def test_info_of_a_guest_and_of_operations(tmp_path):
    linux = trace.load().head(60_000)
    for name in ("guest.npz", "guest.screc"):
        linux.save(tmp_path / name)
        plain = json.loads(run("info", tmp_path / name, "--check", "--json"))
        assert plain["counts"] == linux.counts
        assert plain["guest"]["nframes"] == linux.nframes
    with Writer(tmp_path / "ops.screc", "operations", vm=sc.VM(memory=8192)) as writer:
        writer.write(op=np.array([0, 1, 1, 10]), size=8)
    plain = json.loads(run("info", tmp_path / "ops.screc", "--check", "--json"))
    assert plain["counts"] == {"read": 1, "write": 2, "cmpxchg": 1}
    assert plain["machine"]["memory"] == 8192
    assert "memory 0x2000" in run("info", tmp_path / "ops.screc")


def test_info_finds_damage(tmp_path):
    out = tmp_path / "a.screc"
    run("import", LACKEY / "parent.txt", "-o", out)
    data = bytearray(out.read_bytes())
    at = data.index(b"addr.offset.npy") + 100
    data[at] ^= 1
    out.write_bytes(bytes(data))
    run("info", out)
    assert "block 0, a readable addr.offset.npy expected" in refused("info", out, "--check")
    out.write_bytes(bytes(data[:-5]))
    assert "cut short" in refused("info", out)
    out.write_text("text")
    refused("info", out)
    refused("info", tmp_path / "none")


# -- as a command, with signals and limits ---------------------------------------------------------------


def test_a_full_disk_while_importing(tmp_path):
    rows = instructions(60_000)
    rows["ip"] = np.random.default_rng(0).integers(0, 1 << 62, len(rows))
    (tmp_path / "trace").write_bytes(rows.tobytes())
    program = """
        import resource
        from shadowcore.cli import main
        from shadowcore.recordings import Writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        Writer.__init__.__kwdefaults__["block"] = 10_000
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), "import", "trace", "-o", "out.screc"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "room for the recording expected" in done.stderr
    assert "marked as incomplete" in done.stderr
    with Reader(tmp_path / "out.screc") as reader:
        assert not reader.complete
        assert reader.records > 0
        assert reader.records % 10_000 == 0
        assert sum(block.records for block in reader) == reader.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.screc", "trace"]


def test_an_interrupted_import_keeps_what_was_read(tmp_path):
    """Ctrl-C while a FIFO's text does not come: a file is needed, so the text is made endless instead."""
    (tmp_path / "text").write_bytes(b" L 1ffeffe7f8,8\n" * 4_000_000)
    command = [*COMMAND, "import", *["text"] * 200, "--format", "lackey", "-o", "out.screc"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        time.sleep(0.05)
        partial = tmp_path / "out.screc.partial"
        if partial.exists() and partial.stat().st_size > 5_000:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "shadowcore: interrupted\n")
    with Reader(tmp_path / "out.screc") as reader:
        assert not reader.complete
        assert reader.records > 100_000
        assert sum(block.records for block in reader) == reader.records


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_record(tmp_path):
    done = subprocess.run(
        [*COMMAND, "record", "-o", "out.screc", "--", "echo", "-n", "hello"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "hello")
    assert "records of a program" in done.stderr
    assert "\x1b" not in done.stderr
    plain = json.loads(run("info", tmp_path / "out.screc", "--json"))
    assert plain["source"]["command"] == ["echo", "-n", "hello"]
    assert plain["records"] > 10_000
    assert plain["complete"]


def test_record_without_valgrind(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused("record", "-o", tmp_path / "out.screc", "--", sys.executable)
    assert "'valgrind' is not installed here" in message
    assert not list(tmp_path.iterdir())


def test_limits_of_this_process_are_as_they_were():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 0 < soft <= hard or hard == resource.RLIM_INFINITY
