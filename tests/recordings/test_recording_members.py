"""Members of recordings that are lost, exchanged, cut short or doubled: reading or `info --check` tells."""

import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import refused, run

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.recordings import GUEST, OPERATIONS, PROGRAM, Event, Reader, Writer

KINDS = (OPERATIONS, PROGRAM, GUEST)
SCALARS = ("cr0", "cr4", "efer", "nframes")


def machine(seed=0):
    """A VM with tables, and numbers in two frames, so that memory at the start has words to lose."""
    vm = sc.VM(memory="4MiB", mmu="cached")
    tables = sc.PageTables(vm.memory, mode="64", allocate=range(512, 1024))
    tables.map(0x400000, 0, 0x10000, "rwu")
    vm.memory.words[:1024] = np.random.default_rng(seed).integers(0, 1 << 64, 1024, dtype=np.uint64)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    return vm


def made(kind, path, seed=0):
    """A recording of two blocks of 100 records. Those of two seeds have members of the same names and sizes."""
    rng = np.random.default_rng(seed)
    if kind == GUEST:
        loaded = trace.load()
        part = slice(seed * 200, seed * 200 + 200)
        scalars = {name: getattr(loaded, name) for name in SCALARS}
        with Writer(path, GUEST, name="x", guest=scalars, block=100) as writer:
            writer.write(**{name: array[part] for name, array in loaded.arrays.items()})
    elif kind == PROGRAM:
        with Writer(path, PROGRAM, name="x", block=100) as writer:
            writer.event(Event.MMAP, 0, addr=0x10000 * (1 + seed), size=0x40000, prot=3, flags=0x22)
            writer.write(op=rng.integers(0, 4, 200), size=rng.integers(1, 9, 200), addr=rng.integers(1, 1 << 40, 200))
    else:
        with Writer(path, OPERATIONS, name="x", vm=machine(seed), block=100) as writer:
            op, user = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
            addr, value = 0x400000 + 8 * rng.integers(0, 1000, 200), rng.integers(0, 1 << 60, 200)
            writer.write(op=op, user=user, size=8, addr=addr, value=value)
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewritten(path, contents):
    """A sound archive of these (name, data)."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore", UserWarning)  # a name twice
        for name, data in contents:
            archive.writestr(name, data)
    return path


def tells(path):
    """`info --check` and every way of reading refuse the recording, in one line."""
    refused("info", "--check", path)
    with pytest.raises(sc.TraceError):
        read(path)


def read(path):
    with Reader(path) as reader:
        if reader.stream == OPERATIONS:
            trace.machine(reader, "native")
            list(reader.operations())
        else:
            list(reader)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return {(kind, seed): made(kind, folder / f"{kind}{seed}.screc", seed) for kind in KINDS for seed in (0, 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_is_under_a_checksum_of_the_index(examples, kind):
    found = members(examples[kind, 0])
    index = json.loads(found.pop("index.json"))
    assert set(index["checksums"]) == set(found)
    assert any(name.startswith("memory/") for name in found) == (kind == OPERATIONS)
    run("info", "--check", examples[kind, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_member(examples, kind, tmp_path):
    found = members(examples[kind, 0])
    for lost in found:
        tells(rewritten(tmp_path / "r.screc", [(name, data) for name, data in found.items() if name != lost]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_of_another_recording(examples, kind, tmp_path):
    """Each member that the other recording has as well, sound and of the right shape, but of other contents."""
    found, other = members(examples[kind, 0]), members(examples[kind, 1])
    exchanged = [name for name in found if name in other and other[name] != found[name]]
    assert {"index.json"} < set(exchanged)
    for name in exchanged:
        tells(rewritten(tmp_path / "r.screc", (found | {name: other[name]}).items()))


def test_the_header_of_another_recording(examples, tmp_path):
    """Its registers are those that the operations start with."""
    found = members(examples[OPERATIONS, 0])
    header = json.loads(found["recording.json"])
    header["machine"]["cr3"] ^= 0x1000
    tells(rewritten(tmp_path / "r.screc", (found | {"recording.json": json.dumps(header)}).items()))


@pytest.mark.parametrize("kind", KINDS)
def test_two_members_exchanged(examples, kind, tmp_path):
    """The same column of two blocks, or of two parts of memory: both are sound by themselves."""
    found = members(examples[kind, 0])
    pairs = [(a, a.replace("000000-", "000001-", 1)) for a in found if "/000000-" in a]
    pairs = [(a, b) for a, b in pairs if b in found and found[a] != found[b]]
    assert pairs
    for a, b in pairs:
        tells(rewritten(tmp_path / "r.screc", (found | {a: found[b], b: found[a]}).items()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_cut_short(examples, kind, tmp_path):
    found = members(examples[kind, 0])
    for name, data in found.items():
        for length in (0, len(data) // 2, len(data) - 1):
            tells(rewritten(tmp_path / "r.screc", (found | {name: data[:length]}).items()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_is_there_twice(examples, kind, tmp_path):
    """Which of the two is read would be up to the reader."""
    found = members(examples[kind, 0])
    for name, data in found.items():
        tells(rewritten(tmp_path / "r.screc", [*found.items(), (name, data)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_too_many(examples, kind, tmp_path):
    found = members(examples[kind, 0])
    extra = next(data for name, data in found.items() if name.endswith(".npy"))
    for name in ("blocks/000002-100/addr.npy", "memory/000009-100/word.npy", "blocks/000000-100/x.npy", "blocks/x"):
        tells(rewritten(tmp_path / "r.screc", (found | {name: extra}).items()))


@pytest.mark.parametrize("kind", KINDS)
def test_recordings_without_checksums_are_read(examples, kind, tmp_path):
    """As they were written before there were any."""
    found = members(examples[kind, 0])
    index = json.loads(found["index.json"])
    del index["checksums"], index["memory"]
    path = rewritten(tmp_path / "r.screc", (found | {"index.json": json.dumps(index)}).items())
    run("info", "--check", path)
    with Reader(path) as reader, Reader(examples[kind, 0]) as other:
        for block, same in zip(reader, other, strict=True):
            assert all((block.columns[name] == same.columns[name]).all() for name in block.columns)
    tells(rewritten(tmp_path / "r.screc", [*found.items(), *found.items()]))


def test_members_of_an_npz_recording(tmp_path):
    trace.load().head(500).save(tmp_path / "guest.npz")
    found = members(tmp_path / "guest.npz")
    for name, data in found.items():
        others = [(other, data) for other, data in found.items() if other != name]
        for contents in (others, [*found.items(), (name, data)], [*others, (name, data[:-1])], [*others, (name, b"")]):
            with pytest.raises(sc.TraceError):
                trace.load(rewritten(tmp_path / "r.npz", contents))


@pytest.mark.parametrize("part", range(8))
def test_a_file_cut_short(examples, part, tmp_path):
    for kind in KINDS:
        data = Path(examples[kind, 0]).read_bytes()
        (tmp_path / "r.screc").write_bytes(data[: len(data) * part // 8])
        tells(tmp_path / "r.screc")


def test_a_machine_that_a_recording_cannot_tell_is_refused(tmp_path):
    """Reading would make another one of it."""
    slots = sc.VM([sc.MemorySlot(0, "1MiB"), sc.MemorySlot(1 << 32, "1MiB")])
    features = sc.VM("1MiB", features=sc.Features(nx=False))
    two = sc.VM("1MiB", vcpus=2)
    two.vcpus[1].cr3 = 0x1000
    for vm in (slots, features, two):
        with pytest.raises(sc.ConfigError, match="vm"):
            Writer(tmp_path / "r.screc", OPERATIONS, vm=vm)
    assert not list(tmp_path.iterdir())
