"""Files of any contents: each is read, or refused by an error that says so; nothing else comes out of reading.

The odd ones that were found are written out here and lie in data/odd-files; the rest is made at random, a sample of it
by default and much of it with `-m slow`.
"""

import bz2
import gzip
import io
import lzma
import random
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from places import DATA

import shadowcore as sc
from shadowcore import npy, programs
from shadowcore.recording import importers
from shadowcore.recording import replay as trace
from shadowcore.recordings import GUEST, OPERATIONS, PROGRAM, Event, Reader, Writer
from shadowcore.studies import explain

REFUSALS = (sc.TraceError, sc.ConfigError, sc.SnapshotError, MemoryError)
SCALARS = ("cr0", "cr4", "efer", "nframes")


def attempted(function, *arguments):
    """Whether it works; else it must raise one of the typed errors."""
    try:
        function(*arguments)
    except REFUSALS:
        return False
    return True


# -- headers of arrays -----------------------------------------------------------------------------------------

GOOD = "{'descr': '<u8', 'fortran_order': False, 'shape': (4,), }"
HEADERS = (
    [
        GOOD.replace("(4,)", shape)
        for shape in (
            "(True,)",
            "(4.0,)",
            "(-4,)",
            "(4)",
            "4",
            "()",
            "[4]",
            "('4',)",
            "(None,)",
            "(4, 1)",
            "(2, 2)",
            "(10 ** 9,)",
            "(9223372036854775807, 9223372036854775807)",
            f"({'9' * 400},)",
            "(4,) * 9",
            "(4L,)",
            "((4,),)",
            "(0,)",
            f"({'1, ' * 40})",
            "(4,\x00)",
        )
    ]
    + [
        GOOD.replace("'<u8'", descr)
        for descr in (
            "'O'",
            "'|O8'",
            "'V0'",
            "'<u3'",
            "'<f16'",
            "'<M8[s]'",
            "8",
            "None",
            "True",
            "[]",
            "{}",
            "()",
            "{'names': ['a'], 'formats': ['O']}",
            "[('a', '<u8', (2,))]",
            "[('a', [('b', 'O')])]",
            "[('a', '<u8'), ('a', '<u8')]",
            "[('', '<u4'), ('', '<u4')]",
            "('<u8', (2,))",
            "'(2,)<u4'",
            "'<u4, <u4'",
            "'<U99999999999999999999'",
            "'" + "x" * 5000 + "'",
            "[['a', '<u8']]",
            "b'<u8'",
        )
    ]
    + [
        "[" * 200 + "]" * 200,
        "[" * 5000,
        "(" * 60000,
        "{[1]: 2}",
        "{{}: 1}",
        "{'descr': '<u8', 'fortran_order': 0, 'shape': (4,)}",
        "{'descr': '<u8', 'fortran_order': False}",
        "{'descr': '<u8', 'fortran_order': False, 'shape': (4,), 'more': 1}",
        "'descr'",
        "",
        " ",
        "\x00",
        "{'descr': '<u8', 'fortran_order': False, 'shape': (4,), \n",
        "-" * 9000 + "1",
        "1 + " * 2000 + "1",
        "__import__('os')",
        "'''",
        "\\",
        "lambda: 0",
        "{**{}}",
        "{'descr': f'{1}', 'fortran_order': False, 'shape': (4,)}",
        "é",
    ]
)


def array(header, data=bytes(32), version=(1, 0)):
    text = header.encode("utf-8" if version[0] == 3 else "latin-1") + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def archive(path, contents):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in contents.items():
            file.writestr(name, data)
    return path


def members(path):
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: repr(header[:40]))
def test_headers_of_arrays(header):
    for version in ((1, 0), (2, 0), (3, 0)):
        if version[0] == 1 and len(header) > 0xFFF0:
            continue
        try:
            found = npy.parse(array(header, version=version))
        except ValueError:
            continue
        assert found.nbytes == 32
        assert not found.dtype.hasobject


def test_good_arrays_are_what_numpy_reads(tmp_path):
    """Of all versions, both orders, any number of dimensions, texts and structures, and arrays of nothing."""
    arrays = [
        np.arange(12, dtype="<u8"),
        np.arange(12, dtype=">u4").reshape(3, 4),
        np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        np.array("64"),
        np.array(7, np.uint64),
        np.bool_(False),
        np.zeros((0, 3), np.uint8),
        np.zeros(3, [("a", "<u4"), ("b", "u1")]),
    ]
    for one in arrays:
        for version in ((1, 0), (2, 0), (3, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, np.asanyarray(one), version=version)
            again = npy.parse(file.getvalue())
            assert again.dtype == one.dtype
            assert again.shape == one.shape
            assert (again == one).all()


# -- recordings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One sound file of each kind, by the name of how it is read."""
    folder = tmp_path_factory.mktemp("good")
    loaded = trace.load().head(300)
    loaded.save(folder / "guest.npz")
    with Writer(folder / "guest.screc", GUEST, guest={k: getattr(loaded, k) for k in SCALARS}, block=100) as w:
        w.write(**loaded.arrays)
    with Writer(folder / "program.screc", PROGRAM, block=100) as w:
        w.event(Event.MMAP, 0, addr=0x10000, size=0x4000, prot=3, flags=0x22)
        w.write(op=1, size=8, addr=np.arange(0x10000, 0x14000, 64))
    vm = sc.VM("1MiB", "native")
    vm.memory.words[:4] = 1
    with Writer(folder / "ops.screc", OPERATIONS, vm=vm, block=100) as w:
        w.write(op=1, user=1, size=8, addr=8 * np.arange(200), value=5)
    image = {"mode": np.array("64"), "nframes": np.uint64(16), "mem_gfn": np.array([1], np.uint32)}
    image |= {name: np.uint64(0) for name in ("cr0", "cr3", "cr4", "efer")}
    np.savez(folder / "image.npz", mem_page=np.zeros((1, 4096), np.uint8), root=np.zeros(1, np.uint64), **image)
    vm.save(folder / "vm.state")
    return folder


def read(path, kind):
    if kind == "vm.state":
        sc.VM.load(path)
    elif kind == "image.npz":
        explain.load_image(path)
    elif kind == "guest.npz":
        trace.load(path)
    else:
        with Reader(path, ahead=0) as reader:
            list(reader)
            if reader.stream == OPERATIONS:
                list(reader.operations())
                trace.machine(reader, "native")
            elif reader.stream == PROGRAM:
                list(reader.process(0))
                programs.run(path, "native", operations=100)
            else:
                trace.replay(trace.open_recording(path), "native")


READ = ("guest.npz", "image.npz", "guest.screc", "program.screc", "ops.screc")


@pytest.mark.parametrize("kind", READ)
def test_odd_headers_in_members(good, kind, tmp_path):
    found = members(good / kind)
    assert attempted(read, good / kind, kind)
    names = [name for name in found if name.endswith(".npy")]
    for number, header in enumerate(HEADERS):
        name = names[number % len(names)]
        if len(header) < 0xFFF0:
            assert not attempted(read, archive(tmp_path / kind, found | {name: array(header)}), kind)


ODD_JSON = [b"", b"{}", b"[]", b"null", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 20_000, b"\xff", b"NaN", b"1" * 5000]


def mutated(data, rng):
    """A few bytes changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + rng.randrange(1, 40)]
        elif what == 2:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif what == 3:
            data[at:at] = rng.choice(TOKENS)
        elif what == 4:
            data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8)))
        else:
            del data[at:]
    return bytes(data)


TOKENS = [
    *(
        b"True",
        b"None",
        b"-1",
        b"1e9",
        b"(",
        b")",
        b"[",
        b"]",
        b"{",
        b"}",
        b"'",
        b'"',
        b",",
        b"0x",
        b"\0",
        b"\n",
        b"\r",
    ),
    *(b"99999999999999999999", b"\xff", b" ", b"=", b"==", b"SYSCALL[1,1](56) sys_clone ( 0 ) --> Success(0x1)\n"),
    *(b"--> Success(0x", b"-->", b"... [async]", b"sys_mmap (", b"process 5 created child 6", b"9" * 5000, b"I  "),
    *(b'"', b"kind", b"mmap,", b"fork", b"process", b"exit_group( x ) --> Success(0x0)\n"),
]


def of_members(good, kind, seed, folder):
    """Mutated members in a sound archive, the checksums of its index in accord with them."""
    rng = random.Random(f"{kind} {seed}")
    found = members(good / kind)
    for name in rng.sample(sorted(found), rng.randrange(1, 3)):
        if name.endswith(".json") and rng.random() < 0.2:
            found[name] = rng.choice(ODD_JSON)
        else:
            found[name] = mutated(found[name], rng)
    if "index.json" in found and rng.random() < 0.8:
        index = found["index.json"]
        for name, data in found.items():
            pattern = rb'("' + re.escape(name.encode()) + rb'": )\d+'
            index = re.sub(pattern, lambda m, data=data: m[1] + b"%d" % zlib.crc32(data), index)
        found["index.json"] = index
    read(archive(folder / kind, found), kind)


def of_bytes(good, kind, seed, folder):
    """Mutated bytes of the file itself."""
    (folder / kind).write_bytes(mutated((good / kind).read_bytes(), random.Random(f"bytes {kind} {seed}")))
    read(folder / kind, kind)


# -- texts -----------------------------------------------------------------------------------------------------

TEXTS = {
    "lackey": b"".join((DATA / "lackey" / "parent.txt").read_bytes().splitlines(True)[:200]),
    "csv": b"kind,process,addr,size,prot,flags,file,offset,other\n"
    b'mmap,0,0x10000,8192,3,34,"a,b",0,0\nread,0,65544,8,,,,,\n',
    "champsim": b"".join((0x400000 + 4 * n).to_bytes(8, "little") + bytes(56) for n in range(20)),
    "drmemtrace": b"".join(
        struct.pack("<HHQ", *row)
        for row in [(25, 0, 6), (28, 12, 6), (22, 4, 7), (24, 4, 70), *[(10, 3, 0x401000)] * 18, (23, 4, 7), (26, 0, 0)]
    ),
    "drmemtrace.zip": (DATA / "odd-files" / "drmemtrace-allasm.trace.zip").read_bytes(),
    "cloudsuite": b"".join((0x400000 + 4 * n).to_bytes(8, "little") + bytes(88) for n in range(20)),
    "pinatrace": b"#\n" + b"0x401000: R 0x7ffe0000\n0x401004: W 0x7ffe0008 8 0x1\n" * 10 + b"#eof\n",
    "dinero": b"2 401000\n0 7ffe0000 8\n1 7ffe0008\n" * 10,
    "lackey.gz": gzip.compress(b"I  00401000,2\n L 1ffe,8\n" * 20),
    "lackey.bz2": bz2.compress(b"I  00401000,2\n L 1ffe,8\n" * 20),
    "lackey.lzma": lzma.compress(b"I  00401000,2\n L 1ffe,8\n" * 20, lzma.FORMAT_ALONE),
    "calls": b"""==5== Command: /bin/server
I  00401000,2
SYSCALL[5,1](56) sys_clone ( 3d0f00, 0x54, 0x54, 0x54, 0x54 ) --> [pre-success] Success(0x7)
SYSCALL[5,1](56) sys_clone ( 1200011, 0x0, 0x0, 0x4a27a10, 0x0 )   clone(fork): process 5 created child 8
 --> [pre-success] Success(0x8)
SYSCALL[5,1](2) sys_open ( 0x1(/x), 0 ) --> [async] ...
SYSCALL[5,1](2) ... [async] --> Success(0x3)
SYSCALL[5,1](9) sys_mmap ( 0x0, 8192, 3, 34, 4294967295, 0 ) --> [pre-success] Success(0x10000)
SYSCALL[5,1](25) sys_mremap ( 0x10000, 8192, 16384, 0x0 ) --> [pre-success] Success(0x20000)
SYSCALL[5,1](59) sys_execve ( 0x10a004(/bin/true), 0x1fff000410, 0x1fff0005e0 )==5== Lackey, an example
==5== Command: /bin/true
 S 00401000,2
SYSCALL[5,1](231) exit_group( 3 ) --> [pre-success] Success(0x0)
""",
}

ODD_TEXTS = {
    "clone without flags": ("lackey", "SYSCALL[5,1](56) sys_clone ( 0 ) --> Success(0x1)\n", True),
    "clone of nothing": ("lackey", "SYSCALL[5,1](56) sys_clone ( ) --> Success(0x1)\n", False),
    "clone of words": ("lackey", "SYSCALL[5,1](56) sys_clone ( a b, c ) --> Success(0x1)\n", False),
    "clone of too much": ("lackey", f"SYSCALL[5,1](56) sys_clone ( {'f' * 17}, 0 ) --> Success(0x1)\n", False),
    "a long process": ("lackey", f"=={'5' * 5000}== x\nI  00401000,2\n", True),
    "a long thread": ("lackey", f"SYSCALL[{'5' * 5000},1](56) x\nI  00401000,2\n", True),
    "a long child": (
        "lackey",
        f"SYSCALL[5,1](57) sys_fork ( )  process 5 created child {'6' * 5000} --> Success(0x1)\n",
        True,
    ),
    "a long number": ("csv", f"kind,addr\nread,{'1' * 5000}\n", False),
    "a long result": ("lackey", f"SYSCALL[5,1](12) sys_brk ( 0x0 ) --> Success(0x{'1' * 5000})\n", True),
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts(name, tmp_path):
    form, text, works = ODD_TEXTS[name]
    (tmp_path / "text").write_text(text)
    assert attempted(importers.convert, [tmp_path / "text"], tmp_path / "out.screc", form) == works


def of_text(good, kind, seed, folder):
    """Mutated texts, by their format, and as what they look like."""
    rng = random.Random(f"text {kind} {seed}")
    (folder / "text").write_bytes(mutated(TEXTS[kind], rng))
    form = "auto" if rng.random() < 0.3 else {"calls": "lackey"}.get(kind, kind.partition(".")[0])
    lenient = rng.random() < 0.3 and form in ("lackey", "pinatrace", "dinero")
    importers.convert([folder / "text"], folder / "out.screc", form, lenient=lenient)


FUZZERS = [(of_members, kind) for kind in READ] + [(of_bytes, kind) for kind in READ] + [(of_text, k) for k in TEXTS]


def many(good, fuzzer, kind, seeds, folder):
    results = [attempted(fuzzer, good, kind, seed, folder) for seed in seeds]
    assert not all(results)


@pytest.mark.parametrize(("fuzzer", "kind"), FUZZERS, ids=lambda x: getattr(x, "__name__", x))
def test_some_files_at_random(good, fuzzer, kind, tmp_path):
    many(good, fuzzer, kind, range(60), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("fuzzer", "kind"), FUZZERS, ids=lambda x: getattr(x, "__name__", x))
def test_many_files_at_random(good, fuzzer, kind, tmp_path):
    many(good, fuzzer, kind, range(60, 600), tmp_path)


# -- other errors that have a type -----------------------------------------------------------------------------


def test_blocks_without_events_have_no_segments(good):
    with Reader(good / "ops.screc") as reader:
        with pytest.raises(sc.ConfigError, match="program"):
            next(reader.block(0).segments())
        with pytest.raises(sc.ConfigError, match="program"):
            next(reader.process(0) if reader.stream == PROGRAM else reader.block(1).segments())


def test_no_room_for_a_saved_vm_is_no_fault_of_the_file(good, monkeypatch):
    def nothing(*_):
        raise MemoryError("cannot reserve it")

    monkeypatch.setattr("shadowcore.engine.machine.Memory", nothing)
    with pytest.raises(MemoryError, match="reserve"):
        sc.VM.load(good / "vm.state")
