"""Traces of drmemtrace, pinatrace, Dinero and CloudSuite; what comes compressed, or by a pipe."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import struct
import subprocess
import threading
import zipfile

import numpy as np
import pytest
from commands import COMMAND, ENVIRONMENT, refused, run
from places import DATA
from program_recordings import rows_of

import shadowcore as sc
from shadowcore.recording import importers
from shadowcore.recording.importers import CLOUDSUITE_DTYPE
from shadowcore.recordings import FETCH, READ, WRITE, Event, Reader

FILES = DATA / "odd-files"


def convert(tmp_path, *contents, form="auto", **more):
    paths = [tmp_path / f"input{n}" for n in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    writer = importers.convert(paths, tmp_path / "out.screc", form, **more)
    return rows_of(tmp_path / "out.screc"), writer


# -- drmemtrace ----------------------------------------------------------------------------------------------

# Numbers of the format, from its documentation.
THREAD, EXIT, PID, HEADER, FOOTER, MARKER, ENCODING, TAKEN, NO_FETCH, PREFETCH = 22, 23, 24, 25, 26, 28, 47, 48, 29, 2
TIMESTAMP, CALL_BEGINS, CALL_ENDS = 2, 27, 28


def entries(*rows, code="<HHQ"):
    return b"".join(struct.pack(code, *row) for row in rows)


def trace(tid, pid, *rows, code="<HHQ"):
    return entries((HEADER, 0, 6), (MARKER, 12, 6), (THREAD, 4, tid), (PID, 4, pid), *rows, (FOOTER, 0, 0), code=code)


def test_a_trace_that_dynamorio_wrote(tmp_path):
    """Every instruction of allasm is fetched, in order; the process ends with its one thread."""
    path = FILES / "drmemtrace-allasm.trace.zip"
    with zipfile.ZipFile(path) as archive:
        data = b"".join(archive.read(name) for name in archive.namelist())
    found = [row for row in struct.iter_unpack("<HHQ", data) if 10 <= row[0] <= 16 or row[0] in (48, 49)]
    assert len(found) == 133
    expected = [(0, FETCH, size, addr) for _, size, addr in found] + [(0, Event.EXIT, {})]
    for suffix, made in {".zip": path.read_bytes(), ".gz": gzip.compress(data), "": data}.items():
        rows, writer = convert(tmp_path, made)
        assert rows == expected, suffix
        assert writer.processes[0]["pid"] == 0x1E676A
        assert writer.skipped == {}


def test_progress_of_a_compressed_trace_ends_at_its_size(tmp_path):
    """Bytes of the file are told, not what they are inflated to."""
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(trace(7, 70, *[(10, 1, 4 * n) for n in range(200_000)])))
    told = []
    importers.convert([path], tmp_path / "out.screc", progress=lambda *at: told.append(at))
    assert {total for _, total in told} == {path.stat().st_size}
    assert sorted(told) == told
    assert told[-1][0] == path.stat().st_size


@pytest.mark.parametrize("code", ["<HHQ", "<HHI"])
def test_accesses_of_every_kind(tmp_path, code):
    rows = [
        (MARKER, TIMESTAMP, 5),
        (ENCODING, 4, 0x90909090),
        (10, 4, 0x401000),
        (0, 8, 0x7000),
        (1, 4, 0x8000),
        (TAKEN, 2, 0x401004),
        (NO_FETCH, 2, 0x401004),
        (PREFETCH, 1, 0x9000),
        (20, 64, 0xA000),
        (0, 0, 0xB000),
        (EXIT, 0, 7),
    ]
    found, writer = convert(tmp_path, trace(7, 70, *rows, code=code))
    assert found == [
        (0, FETCH, 4, 0x401000),
        (0, READ, 8, 0x7000),
        (0, WRITE, 4, 0x8000),
        (0, FETCH, 2, 0x401004),
        (0, READ, 1, 0xB000),
        (0, Event.EXIT, {}),
    ]
    assert writer.skipped == {"prefetches": 1, "cache flushes": 1}


def test_threads_in_one_file(tmp_path):
    rows = [
        (10, 1, 1),
        (THREAD, 4, 8),
        (PID, 4, 70),
        (10, 1, 2),
        (THREAD, 4, 9),
        (PID, 4, 71),
        (10, 1, 3),
        (THREAD, 4, 7),
        (10, 1, 4),
        (EXIT, 0, 7),
        (THREAD, 4, 8),
        (10, 1, 5),
        (EXIT, 0, 8),
        (THREAD, 4, 9),
        (EXIT, 0, 9),
    ]
    found, writer = convert(tmp_path, trace(7, 70, *rows))
    assert found == [
        (0, FETCH, 1, 1),
        (0, Event.CLONE, {"flags": 0x100}),
        (0, FETCH, 1, 2),
        (1, FETCH, 1, 3),
        (0, FETCH, 1, 4),
        (0, FETCH, 1, 5),
        (0, Event.EXIT, {}),
        (1, Event.EXIT, {}),
    ]
    assert [entry["pid"] for entry in writer.processes] == [70, 71]


def test_threads_in_files_are_put_in_order(tmp_path):
    one = trace(7, 70, *((e) for n in (10, 30, 50) for e in [(MARKER, TIMESTAMP, n), (10, 1, n)]), (EXIT, 0, 7))
    two = trace(8, 70, *((e) for n in (20, 40, 60) for e in [(MARKER, TIMESTAMP, n), (10, 1, n)]), (EXIT, 0, 8))
    found, _ = convert(tmp_path, one, two)
    assert [row[3] for row in found if len(row) == 4] == [10, 20, 30, 40, 50, 60]
    assert [row[1] for row in found if len(row) == 3] == [Event.CLONE, Event.EXIT]
    assert found[-1] == (0, Event.EXIT, {})


def test_the_kernel_s_part_is_skipped_and_counted(tmp_path):
    rows = [
        (10, 2, 0x401000),
        (MARKER, 25, 1),
        (MARKER, CALL_BEGINS, 1),
        (10, 3, 0xFFFFFFFF81000000),
        (0, 8, 0x7000),
        (MARKER, CALL_BEGINS, 2),
        (10, 3, 0x10),
        (MARKER, CALL_ENDS, 2),
        (1, 8, 0x7008),
        (MARKER, CALL_ENDS, 1),
        (10, 2, 0x401002),
        (10, 2, 0xFFFFFFFF81000010),
        (MARKER, CALL_ENDS, 1),
        (0, 2, 0x401004),
        (MARKER, CALL_BEGINS, 1),
        (10, 3, 0x20),
    ]
    for chunk in (1 << 20, 12, 31):
        found, writer = convert(tmp_path, trace(7, 70, *rows))
        assert [row[3] for row in found] == [0x401000, 0x401002, 0x401004], chunk
        assert writer.skipped == {"accesses of the kernel": 6}


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_the_parts_in_which_a_trace_comes_do_not_matter(tmp_path, chunk, monkeypatch):
    rows = [(10, 1, 1), (MARKER, CALL_BEGINS, 1), (10, 1, 2), (MARKER, CALL_ENDS, 1), (0, 1, 3), (MARKER, TIMESTAMP, 9)]
    data = trace(7, 70, *rows * 50, (EXIT, 0, 7))
    whole, _ = convert(tmp_path, data)
    assert whole == [(0, FETCH, 1, 1), (0, READ, 1, 3)] * 50 + [(0, Event.EXIT, {})]
    for name, size in (("HEAD_MIN", 36), ("CHUNK", chunk), ("CHUNK_MIN", chunk)):
        monkeypatch.setattr(importers.drmemtrace, name, size)
    found, writer = convert(tmp_path, data)
    assert found == whole
    assert writer.skipped == {"accesses of the kernel": 50}


@pytest.mark.parametrize(
    ("data", "record", "expected"),
    [
        (trace(7, 70, (10, 1, 0x401000))[:-12], 5, "the trace ends without it"),
        (trace(7, 70, (10, 1, 0x401000))[:-5], 5, "the trace ends after 7 bytes of an entry"),
        (trace(7, 70, (10, 1, 0x401000), (99, 1, 0x401000)), 5, "an entry of a known type expected, not 99"),
        (trace(7, 70, (10, 1, 0x401000), (17, 1, 0x401000)), 5, "a bundle of instructions, as online traces have"),
        (gzip.compress(trace(7, 70, *[(10, 1, 7919 * n) for n in range(999)]))[:-99], None, "whole compressed data"),
    ],
)
def test_wrong_traces_of_drmemtrace_are_named(tmp_path, data, record, expected):
    with pytest.raises(sc.TraceError) as caught:
        convert(tmp_path, data)
    assert (caught.value.file, caught.value.record) == (str(tmp_path / "input0"), record)
    assert expected in str(caught.value)
    if record is not None:
        with Reader(tmp_path / "out.screc") as reader:
            assert (reader.complete, reader.records) == (False, 1)


def test_archives_that_are_damaged(tmp_path):
    data = bytearray((FILES / "drmemtrace-allasm.trace.zip").read_bytes())
    for changed in (data[:-30], data[:300], data[:200] + b"\0\0\0\0" + data[204:]):
        (tmp_path / "a.zip").write_bytes(changed)
        assert "a whole archive of chunks expected" in refused("import", tmp_path / "a.zip", "-o", tmp_path / "o")
    (tmp_path / "other.zip").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    assert "a zip archive of other contents" in refused("import", tmp_path / "other.zip", "-o", tmp_path / "o")
    said = refused("import", tmp_path / "other.zip", "-o", tmp_path / "o", "--format", "drmemtrace")
    assert "header of a trace of drmemtrace" in said


def test_raw_traces_are_told(tmp_path):
    raw = struct.pack("<QQ", 6 << 61 | 4 << 56 | 7 << 48 | 0x40, 2 << 61 | 99) * 20
    (tmp_path / "raw").write_bytes(raw)
    assert "-indir DIR" in refused("import", tmp_path / "raw", "-o", tmp_path / "out.screc")


# -- pinatrace and Dinero ------------------------------------------------------------------------------------


def test_pinatrace(tmp_path):
    found, writer = convert(tmp_path, (FILES / "pinatrace.out").read_bytes())
    assert found == [
        (0, FETCH, 1, 0x7F3A1F10),
        (0, READ, 1, 0x7FFEE32B8FF8),
        (0, FETCH, 1, 0x7F3A1F15),
        (0, WRITE, 1, 0x7FFEE32B8FF0),
    ]
    assert writer.complete


def test_pinatrace_with_sizes_and_values(tmp_path):
    text = b"#\n# Memory Access Trace Generated By Pin\n0x10: W 0x7ffe0000  8 0x12\r\n0x10: R   0x7ffe0008  4\n#eof\n"
    assert convert(tmp_path, text)[0] == [(0, FETCH, 1, 16), (0, WRITE, 8, 0x7FFE0000), (0, READ, 4, 0x7FFE0008)]


def test_a_cut_pinatrace_is_incomplete(tmp_path):
    (tmp_path / "cut").write_bytes((FILES / "pinatrace.out").read_bytes()[:-6])
    said = run("import", tmp_path / "cut", "-o", tmp_path / "out.screc")
    assert "The recording is incomplete" in said
    with Reader(tmp_path / "out.screc") as reader:
        assert (reader.complete, reader.records) == (False, 4)


def test_dinero(tmp_path):
    text = b"2 401000\n0 7ffe0000\n1 0x7ffe0008 8\nr 1000 10\n  i 2000\n3 5000\n4 1000\nw ffffffffffff f\n"
    found, writer = convert(tmp_path, text)
    assert found == [
        (0, FETCH, 1, 0x401000),
        (0, READ, 1, 0x7FFE0000),
        (0, WRITE, 8, 0x7FFE0008),
        (0, READ, 16, 0x1000),
        (0, FETCH, 1, 0x2000),
        (0, WRITE, 15, 0xFFFFFFFFFFFF),
    ]
    assert writer.skipped == {"escape records (3)": 1, "cache flushes (4)": 1}


def test_columns_of_small_numbers_are_no_dinero(tmp_path):
    (tmp_path / "numbers").write_text("0 12\n1 13\n2 14\n")
    assert "this looks like none" in refused("import", tmp_path / "numbers", "-o", tmp_path / "out.screc")
    run("import", tmp_path / "numbers", "-o", tmp_path / "out.screc", "--format", "dinero")


@pytest.mark.parametrize(
    ("form", "text", "line"),
    [
        ("pinatrace", b"0x10: R 0x20\nhello\n0x10: W 0x30\n#eof\n", 2),
        ("pinatrace", b"0x10: R 0x20\n0x10: W \n", 2),
        ("pinatrace", b"0x10: R 0x20\n0x10: W 0x30 99999\n", 2),
        ("pinatrace", b"0x10: R 0x20\n0x10: W 0x12345678123456781\n", 2),
        ("dinero", b"0 1000\n\n9 1000\n", 3),
        ("dinero", b"0 1000\n1 xyz\n", 2),
        ("dinero", b"0 1000\n1 1000 0\n", 2),
        ("dinero", b"0 1000\n\0\n", 2),
        ("dinero", b"0 1000\n" + b"1" * 70_000, 2),
        ("dinero", b"", 1),
        ("pinatrace", b"# nothing\n", 1),
    ],
)
def test_wrong_texts_are_named_or_skipped(tmp_path, form, text, line):
    with pytest.raises(sc.TraceError) as caught:
        convert(tmp_path, text, form=form)
    assert (caught.value.record, caught.value.unit) == (line, "line")
    if line > 1:
        assert "marked as incomplete" in str(caught.value)
        if b"\0" not in text and len(text) < 1000:
            _, writer = convert(tmp_path, text, form=form, lenient=True)
            assert writer.skipped == {"lines of others": 1}


# -- CloudSuite ----------------------------------------------------------------------------------------------


def test_cloudsuite(tmp_path):
    """The layout that a C compiler gives the structure, read by its offsets."""
    data = (FILES / "cloudsuite-20-instructions.bin").read_bytes()
    expected = []
    for at in range(0, len(data), 96):
        (ip,) = struct.unpack_from("<Q", data, at)
        stores, loads = struct.unpack_from("<4Q", data, at + 24), struct.unpack_from("<4Q", data, at + 56)
        expected += [(0, FETCH, 1, ip)]
        expected += [(0, READ, 1, addr) for addr in loads if addr] + [(0, WRITE, 1, addr) for addr in stores if addr]
    assert convert(tmp_path, data)[0] == expected
    assert CLOUDSUITE_DTYPE.itemsize == 96
    assert "an instruction of 64 bytes" in refused(
        "import", FILES / "cloudsuite-20-instructions.bin", "-o", tmp_path / "o", "--format", "champsim"
    )
    assert "an instruction of 96 bytes" in refused(
        "import", FILES / "champsim-10.bz2", "-o", tmp_path / "o", "--format", "cloudsuite"
    )


def test_address_spaces_are_processes(tmp_path):
    rows = np.zeros(6, CLOUDSUITE_DTYPE)
    rows["ip"], rows["asid"] = 0x401000 + np.arange(6), [1, 1, 2, 1, 2, 2]
    found, writer = convert(tmp_path, rows.tobytes())
    assert [(row[0], row[3] & 15) for row in found] == [(0, 0), (0, 1), (1, 2), (0, 3), (1, 4), (1, 5)]
    assert len(writer.processes) == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_layouts_are_told_apart(tmp_path, seed):
    """Instructions with many operands, in either layout: neither is taken for the other."""
    rng = np.random.default_rng(seed)
    for form, dtype in (("champsim", importers.CHAMPSIM_DTYPE), ("cloudsuite", CLOUDSUITE_DTYPE)):
        rows = np.zeros(rng.integers(3, 200), dtype)
        rows["ip"] = 0x400000 + 4 * rng.integers(0, 1000, len(rows))
        rows["is_branch"] = rng.integers(0, 2, len(rows))
        for name in ("source_memory", "destination_memory"):
            shape = rows[name].shape
            rows[name] = (rng.random(shape) < 0.6) * rng.integers(1 << 12, 1 << 47, shape)
        (tmp_path / "trace").write_bytes(rows.tobytes())
        assert importers.guess(tmp_path / "trace") == form


def test_guess_leaves_standard_input_alone():
    with pytest.raises(sc.ConfigError, match="standard input"):
        importers.guess("-")


# -- compressed, and by a pipe -------------------------------------------------------------------------------

LINES = b"".join(b"I  %08x,4\n" % (0x401000 + 4 * n) for n in range(5000))


def zstd(data):
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        module = pytest.importorskip("backports.zstd")
    return module.compress(data)


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zst": zstd,
}


@pytest.mark.parametrize("name", PACKERS)
def test_compressed_inputs(tmp_path, name):
    packed = PACKERS[name](LINES)
    (tmp_path / "a").write_bytes(packed)
    found, _ = convert(tmp_path, packed)
    assert len(found) == 5000
    for cut in (len(packed) - 3, len(packed) // 2):
        (tmp_path / "cut").write_bytes(packed[:cut])
        said = refused("import", tmp_path / "cut", "-o", tmp_path / "o", "--format", "lackey")
        assert "whole compressed data expected" in said
        assert "cut" in said


def test_champsim_under_bzip2(tmp_path):
    found, _ = convert(tmp_path, (FILES / "champsim-10.bz2").read_bytes())
    assert [row[3] for row in found if row[1] == FETCH][:2] == [0x401AB70, 0x401AB73]
    assert (0, WRITE, 1, 0x1FFF000758) in found


def test_zstd_without_its_package(tmp_path, monkeypatch):
    packed = zstd(LINES)
    import_module = importers.source.importlib.import_module

    def none(name, package=None):
        if "zstd" in name:
            raise ImportError(name)
        return import_module(name, package)

    monkeypatch.setattr(importers.source.importlib, "import_module", none)
    with pytest.raises(sc.TraceError, match=r"pip install 'shadowcore\[zstd\]'"):
        convert(tmp_path, packed)


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        (b"\x04\x22\x4d\x18", "lz4 -d"),
        (b"7z\xbc\xaf\x27\x1c", "7z x"),
        (b"PERFILE2", "data of perf"),
        (b"\x17\x08\x44tracing", "trace-cmd report"),
        (b"\x7fELF", "an ELF file"),
        (b"KDUMP   ", "a memory image"),
        (b"\xff\xfek\0i\0", "UTF-16"),
        (b"==5== Memcheck, a memory error detector\n", "line 2"),
    ],
)
def test_other_files_are_told(tmp_path, mark, what):
    (tmp_path / "file").write_bytes(mark + bytes(100))
    said = refused("import", tmp_path / "file", "-o", tmp_path / "out.screc")
    assert what in said


def piped(data, *arguments, cwd):
    words = [*COMMAND, "import", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=ENVIRONMENT, input=data, capture_output=True, check=False)


@pytest.mark.parametrize("name", ["plain", *PACKERS])
def test_standard_input(tmp_path, name):
    done = piped(PACKERS.get(name, bytes)(LINES), "-", "-o", "out.screc", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Reader(tmp_path / "out.screc") as reader:
        assert reader.records == 5000
        assert reader.source == {"format": "lackey", "files": ["standard input"]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", b"this looks like none"),
        (b"what?\n", b"this looks like none"),
        (LINES + b"hello\n", b"standard input, line 5001: "),
        (gzip.compress(LINES)[:-20], b"whole compressed data"),
        ((FILES / "drmemtrace-allasm.trace.zip").read_bytes(), b"a file expected, not a pipe"),
    ],
)
def test_standard_input_that_is_refused(tmp_path, data, said):
    done = piped(data, "-", "-o", "out.screc", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_guests_do_not_come_by_a_pipe(tmp_path):
    sc.trace.load().head(100).save(tmp_path / "guest.npz")
    done = piped((tmp_path / "guest.npz").read_bytes(), "-", "-o", "out.screc", cwd=tmp_path)
    assert (done.returncode, b"a file expected, not a pipe" in done.stderr) == (2, True)
    assert "is read once" in refused("import", "-", "-", "-o", tmp_path / "out.screc")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_and_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(LINES)

    def feed():
        with open(tmp_path / "pipe", "wb") as pipe:
            for at in range(0, len(LINES), 7000):
                pipe.write(LINES[at : at + 7000])

    thread = threading.Thread(target=feed)
    thread.start()
    plain = json.loads(run("import", tmp_path / "pipe", tmp_path / "file", "-o", tmp_path / "out.screc", "--json"))
    thread.join()
    assert (plain["records"], plain["processes"]) == (10_000, 2)


def test_a_pipe_of_small_parts(tmp_path, monkeypatch):
    """A pipe that gives a byte at a time is told by its contents all the same."""

    class Slow(io.RawIOBase):
        def __init__(self, data):
            self.data = data

        def read(self, size=-1):
            first, self.data = self.data[:1], self.data[1:]
            return first

    class Standard:
        buffer = Slow(gzip.compress(LINES[:1400]))

    monkeypatch.setattr(importers.source.sys, "stdin", Standard)
    importers.convert(["-"], tmp_path / "out.screc")
    assert len(rows_of(tmp_path / "out.screc")) == 100
