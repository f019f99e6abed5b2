"""docs/recordings.md is enough to read a recording by: its example in hex is one, and the readers in examples/, which
know nothing else, find in it and in others what the package's reader finds."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from places import ROOT

import shadowcore as sc
from shadowcore.recording.reader import Reader
from shadowcore.recording.writer import Writer

PAGE = ROOT / "docs" / "recordings.md"
COLUMNS = ("vcpu", "kind", "flags", "insns", "addr", "value")


def blocks():
    """The two blocks of text of the page's example: records, and the file."""
    section = PAGE.read_text("utf-8").split("## An example in full")[1]
    return re.findall(r"```text\n(.*?)```", section, re.S)[:2]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    out = tmp_path_factory.mktemp("specification") / "tiny.screc"
    data = bytearray()
    for line in blocks()[1].splitlines():
        at, _, words = line.partition(":")
        assert int(at, 16) == len(data)
        data += bytes.fromhex(words)
    out.write_bytes(data)
    assert f"The file, {len(data):,} bytes" in PAGE.read_text("utf-8")
    return out


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A recording of many blocks and four processors, whose columns take every form."""
    out = tmp_path_factory.mktemp("several") / "several.screc"
    random = np.random.default_rng(3)
    count = 5000
    pages = random.integers(0, 1 << 52, 40, dtype=np.uint64) << np.uint64(12)
    guest = {"cr0": 0x80050033, "cr4": 0x20, "efer": 0xD00, "nframes": 64, "vcpus": 4}
    with Writer(out, "guest", guest=guest, block=1024) as writer:
        writer.write(
            kind=np.full(count, 6),
            flags=random.integers(0, 1 << 11, count),
            addr=pages[random.integers(0, 40, count)] + random.integers(0, 4096, count).astype(np.uint64),
            value=random.integers(0, 1 << 63, count, dtype=np.uint64),
            vcpu=random.integers(0, 4, count),
        )
        writer.write(kind=np.full(2000, 5), flags=np.zeros(2000, int), addr=pages[:1].repeat(2000), insns=[7] * 2000)
    return out


def text_of(path):
    """As the readers print it, from the package's own."""
    with Reader(path) as reader:
        parts = [block.columns for block in reader]
    rows = zip(*(np.concatenate([part[name] for part in parts]).tolist() for name in COLUMNS), strict=True)
    return "".join(" ".join(f"{number:x}" for number in row) + "\n" for row in rows)


def test_the_example_is_what_the_page_says(example):
    assert text_of(example) == blocks()[0]
    loaded = sc.trace.load(example)
    assert loaded.name == "tiny"
    assert loaded.counts["tables"] == 2
    result = sc.trace.replay(loaded, "cached", audit_every=1)
    assert (result.table_stores, result.snapshot_words, result.violations) == (1, 1, ())


def c_reader(folder):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    out = folder / "screc"
    source = ROOT / "examples" / "c" / "screc.c"
    command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-o", str(out), str(source), "-lz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and ("zlib.h" in done.stderr or "-lz" in done.stderr):
        pytest.skip("no zlib to compile with")
    assert done.returncode == 0, done.stderr
    return [str(out)]


def python_reader(folder):
    return [sys.executable, str(ROOT / "examples" / "python" / "screc.py")]


@pytest.mark.parametrize("reader", [c_reader, python_reader])
def test_readers_find_the_same(example, several, tmp_path, reader):
    command = reader(tmp_path)
    for path in (example, several):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
        assert done.stdout == text_of(path)


@pytest.mark.parametrize("reader", [c_reader, python_reader])
def test_readers_refuse_damage(example, tmp_path, reader):
    command = reader(tmp_path)
    data = bytearray(example.read_bytes())
    data[data.index(b"blocks/000000-8/addr.npy") + 24 + 4] ^= 0x10
    broken = tmp_path / "broken.screc"
    broken.write_bytes(data)
    assert subprocess.run([*command, str(broken)], capture_output=True, check=False).returncode != 0


def test_the_reader_in_python_says_what_is_wrong_in_a_line(example, tmp_path):
    data = example.read_bytes()
    made = {"cut": data[:-40], "short": data[: len(data) // 2], "empty": b"", "text": b"nothing of the kind\n"}
    made["broken"] = data.replace(b"blocks/000000-8/addr", b"blocks/000000-8/addx")
    for name, contents in made.items():
        (tmp_path / name).write_bytes(contents)
    for path in (*(tmp_path / name for name in made), tmp_path / "none", tmp_path):
        done = subprocess.run([*python_reader(tmp_path), str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"screc.py: {path}: ")
    assert subprocess.run(python_reader(tmp_path), capture_output=True, text=True, check=False).stderr.count("\n") == 1


def test_files_of_version_1_are_read(several, tmp_path):
    """A recording as it was written before: no processors in the header, and kinds up to 7."""
    old = tmp_path / "old.screc"
    with zipfile.ZipFile(several) as source, zipfile.ZipFile(old, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename == "recording.json":
                header = json.loads(data)
                header["version"] = 1
                del header["guest"]["vcpus"]
                data = json.dumps(header).encode()
            if info.filename == "index.json":
                index = json.loads(data)
                del index["checksums"]
                for block in index["blocks"]:
                    block["arrays"] = [name for name in block["arrays"] if name != "vcpu"]
                data = json.dumps(index).encode()
            if not info.filename.endswith("/vcpu.npy"):
                target.writestr(info, data)
    loaded = sc.trace.load(old)
    assert loaded.vcpus == 1
    assert not loaded.vcpu.any()
    assert (loaded.addr == sc.trace.load(several).addr).all()


@pytest.mark.parametrize("suffix", [".screc", ".npz"])
def test_several_processors_survive(several, tmp_path, suffix):
    loaded = sc.trace.load(several)
    loaded.save(tmp_path / f"again{suffix}")
    again = sc.trace.load(tmp_path / f"again{suffix}")
    assert again.vcpus == 4
    assert all((again.arrays[name] == loaded.arrays[name]).all() for name in COLUMNS)


def test_a_processor_too_many_is_named(several, tmp_path):
    out = tmp_path / "bad.screc"
    with Writer(out, "guest", guest={"cr0": 0, "cr4": 0, "efer": 0, "nframes": 1, "vcpus": 2}) as writer:
        writer.write(kind=[5, 5], vcpu=[1, 2])
    with pytest.raises(sc.TraceError) as caught:
        sc.trace.load(out)
    assert (caught.value.record, caught.value.expected) == (1, "a processor below 2 expected, not vcpu 0x2")
