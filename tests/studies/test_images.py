"""Memory images: those that QEMU wrote, held against its own list of translations; other formats; damage."""

import json
import lzma
import os
import random
import re
import struct

import numpy as np
import pytest
from commands import refused, run
from places import DATA

import shadowcore as sc
from shadowcore.pagetables import FORMATS, PageTables
from shadowcore.recording import replay as trace
from shadowcore.recordings import Writer
from shadowcore.studies import images
from shadowcore.studies.explain import explain, load_image

FOLDER = DATA / "images"
MODES = ("32", "pae", "64")
ROOT = 0x8000


def unpacked(mode, kind, folder):
    path = folder / f"{mode}.{kind}"
    path.write_bytes(lzma.decompress((FOLDER / f"{mode}.{kind}.xz").read_bytes()))
    return path


def listed(mode):
    """(gva, gpa, user, writable, not executable) as QEMU's `info tlb` has them."""
    found = re.findall(r"^([0-9a-f]{16}): ([0-9a-f]{16}) (.{9})$", (FOLDER / f"{mode}.tlb.txt").read_text(), re.M)
    assert len(found) == 11
    # Of PAE's entries it prints bit 63 with the address.
    return [
        (int(va, 16), int(pa, 16) & ~(1 << 63), flags[7] == "U", flags[8] == "W", flags[0] == "X")
        for va, pa, flags in found
    ]


def check(vm, mode):
    for gva, gpa, user, writable, no_execute in listed(mode):
        t = vm.vcpus[0].translate(gva)
        assert (t.gpa, t.user, t.writable, not t.executable) == (gpa, user, writable, no_execute)


@pytest.mark.parametrize("mode", MODES)
def test_cores_of_qemu_tell_mode_and_root(mode, tmp_path):
    dump = images.open_dump(unpacked(mode, "dump", tmp_path))
    assert dump.registers["cr3"] == ROOT
    image = dump.image()
    assert (image.mode, image.cr3, image.roots) == (mode, ROOT, (ROOT,))
    check(image.machine(), mode)
    for gva, gpa, *_ in listed(mode):  # with what one address needs, too
        vm = images.machine(tmp_path / f"{mode}.dump", gva=gva)
        found = explain(vm, gva)
        assert found.gpa == gpa
        assert [(step.level, step.gpa, step.entry) for step in found.steps] == PageTables(
            image.machine().memory, mode, root=ROOT
        ).walk(gva)


@pytest.mark.parametrize("mode", MODES)
def test_raw_memory_with_root_and_mode(mode, tmp_path):
    path = unpacked(mode, "raw", tmp_path)
    check(images.open_dump(path).image(ROOT, mode).machine(), mode)
    gva = 0x401000
    assert json.loads(run("walk", path, gva, "--cr3", ROOT, "--mode", mode, "--json"))["gpa"] == 0xB000
    said = refused("walk", path, gva)
    assert "--cr3 and --mode needed" in said
    assert "--mode needed" in refused("walk", path, gva, "--cr3", ROOT)
    assert "it is not in the image" in refused("walk", path, gva, "--cr3", 0x7000000, "--mode", mode)


def lime(pieces):
    return b"".join(struct.pack("<4sIQQ8x", b"EMiL", 1, gpa, gpa + len(data) - 1) + data for gpa, data in pieces)


@pytest.mark.parametrize("mode", MODES)
def test_lime_in_pieces(mode, tmp_path):
    raw = unpacked(mode, "raw", tmp_path).read_bytes()
    path = tmp_path / "a.lime"
    path.write_bytes(lime([(0, raw[:0x3000]), (0x8000, raw[0x8000:]), (1 << 32, bytes(8192))]))
    dump = images.open_dump(path)
    assert dump.nframes == (1 << 20) + 2
    check(dump.image(ROOT, mode).machine(), mode)


@pytest.mark.parametrize("mode", MODES)
def test_import_makes_an_image_of_the_documented_format(mode, tmp_path):
    core, raw = unpacked(mode, "dump", tmp_path), unpacked(mode, "raw", tmp_path)
    said = run("import", core, "-o", tmp_path / "a.npz")
    assert f"frames of page tables, mode {mode}, CR3 0x8000" in said
    run("import", raw, "-o", tmp_path / "b.npz", "--cr3", ROOT, "--mode", mode, "--json")
    one, two = load_image(tmp_path / "a.npz"), load_image(tmp_path / "b.npz")
    assert (one.pages == two.pages).all()
    assert one.frames.tolist() == two.frames.tolist()
    check(one.machine(), mode)
    check(two.machine(), mode)
    assert json.loads(run("walk", tmp_path / "a.npz", "0x401000", "--json"))["gpa"] == 0xB000


def test_what_import_refuses_of_images(tmp_path):
    core = unpacked("64", "dump", tmp_path)
    assert "--cr3, --mode" in refused("import", core, "-o", tmp_path / "a.screc", "--cr3", 0)
    assert "one FILE" in refused("import", core, core, "-o", tmp_path / "a.npz")
    assert "another file" in refused("import", core, "-o", core)
    assert "cannot be written" in refused("import", core, "-o", tmp_path / "none" / "a.npz")
    assert not list(tmp_path.glob("*.npz*"))


def test_saved_machines(tmp_path):
    vm = sc.VM("4MiB", "cached")
    tables = PageTables(vm.memory, "64", allocate=range(512, 1024))
    tables.map(0x400000, 0x10000, 0x8000, "rwu")
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    vm.vcpus[0].read(0x400000, user=True)
    vm.save(tmp_path / "vm.state")
    assert json.loads(run("walk", tmp_path / "vm.state", "0x401000", "--json"))["gpa"] == 0x11000
    plain = json.loads(run("explain", tmp_path / "vm.state", "0x400000", "--user", "--json"))
    assert (plain["design"], plain["hit"], len(plain["shadow"])) == ("cached", True, 4)
    assert "its own design" in refused("explain", tmp_path / "vm.state", "0x400000", "--mmu", "unsync")
    assert "mode" in refused("walk", tmp_path / "vm.state", 0, "--mode", "64")
    assert "record" in refused("walk", tmp_path / "vm.state", 0, "--record", 1)


def test_recordings_at_a_record(tmp_path):
    """The machine is that of a replay which stops there: same counters, same shadow."""
    loaded = trace.load().head(60_000)
    loaded.save(tmp_path / "guest.npz")
    loaded.save(tmp_path / "guest.screc")
    for name in ("guest.npz", "guest.screc"):
        vm = images.machine(tmp_path / name, "cached", record=50_000)
        before = vm.stats.as_dict()
        assert vm.audit().ok
        again = trace.machine_at(trace.open_recording(tmp_path / name), "cached", 50_000)
        assert again.stats.as_dict() == before
    counters = trace.replay(loaded, "cached", stop=50_000).whole.counters
    assert counters["exits_fill"] > 1000
    assert {name: before[name] for name in counters} == counters
    run("walk", tmp_path / "guest.npz", "0xffffffff81000000", "--record", 50_000)
    run("walk", tmp_path / "guest.screc", "0xffffffff81000000")
    assert "60000" in refused("walk", tmp_path / "guest.npz", 0, "--record", 60_001)


def test_operations_at_a_record(tmp_path):
    vm = sc.VM("4MiB", "native")
    tables = PageTables(vm.memory, "64", allocate=range(512, 1024))
    tables.map(0x400000, 0x10000, 0x8000, "rwu")
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    with Writer(tmp_path / "ops.screc", "operations", vm=vm, block=4) as writer:
        writer.write(op=1, user=1, size=8, addr=0x400000 + 8 * np.arange(10), value=7)
    for record, expected in ((0, 0), (5, 0), (6, 7), (None, 7)):
        made = images.machine(tmp_path / "ops.screc", "cached", record=record)
        assert made.memory.words[0x10000 // 8 + 5] == expected
    assert "programs have no page tables" in refused("walk", DATA / "programs" / "true.screc", 0)


def test_without_arguments_there_is_an_image():
    assert "gva 0x401000: supervisor read, 4-level paging" in run("walk")
    assert "gva 0x402000: user instruction fetch" in run("walk", "0x402000", "--fetch", "--user")
    text = run("explain", "--user")
    for words in ("THE GUEST'S WALK", "THE SHADOW'S WALK", "WHAT THE ACCESS WOULD DO", "design unsync"):
        assert words in text
    assert json.loads(run("explain", "0x401000", "--mmu", "native", "--json"))["shadow"] is None


def test_a_page_of_an_access(tmp_path):
    run("explain", "--user", "--html", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "http" not in page
    assert "cannot be written" in refused("explain", "--html", tmp_path / "none" / "a.html")


def test_what_walk_refuses(tmp_path):
    core = unpacked("64", "dump", tmp_path)
    assert "Missing argument 'VA'" in refused("walk", core)
    assert "exclude each other" in refused("walk", core, 0, "--write", "--fetch")
    assert "not 3 arguments" in refused("walk", core, 0, 1)
    assert "not a number" in refused("walk", core, "here")
    assert "No such file" in refused("walk", tmp_path / "none", 0)
    assert "QEMU's dump-guest-memory without -z" in refused("walk", unpacked("64", "kdump", tmp_path), 0)
    (tmp_path / "raw-kdump").write_bytes(b"KDUMP   " + bytes(8184))
    assert "kdump-compressed" in refused("walk", tmp_path / "raw-kdump", 0)
    assert "makedumpfile -E" in refused("walk", tmp_path / "raw-kdump", 0)
    (tmp_path / "flat").write_bytes(b"makedumpfile\0".ljust(8192, b"\0"))
    assert "makedumpfile -R OUT < FILE" in refused("walk", tmp_path / "flat", 0)
    assert "another file" in refused("explain", core, 0, "--html", core)
    assert "unpack it first" in refused("walk", FOLDER / "64.dump.xz", 0)
    assert "behind 1 byte(s) of memory" in refused("walk", DATA / "odd-files" / "lime.bin", 0)
    (tmp_path / "odd").write_bytes(bytes(4097))
    assert "this looks like none" in refused("walk", tmp_path / "odd", 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for command in (("walk", tmp_path / "pipe", 0), ("explain", tmp_path / "pipe", 0, "--cr3", 0, "--mode", "64")):
        assert "not a pipe" in refused(*command)
    assert "not a pipe" in refused("import", tmp_path / "pipe", "-o", tmp_path / "a.npz", "--cr3", 0, "--mode", "64")
    assert "directory" in refused("walk", tmp_path, 0)


# -- damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    raw = unpacked("64", "raw", folder).read_bytes()
    files = {"dump": unpacked("64", "dump", folder).read_bytes(), "raw": raw}
    return files | {"lime": lime([(0, raw[:0x8000]), (0x8000, raw[0x8000:])])}


@pytest.mark.parametrize("kind", ["dump", "raw", "lime"])
def test_damaged_images_are_walked_or_refused(kind, sound, tmp_path):
    refusals = (sc.TraceError, sc.ConfigError, sc.SnapshotError, MemoryError)
    path, works = tmp_path / "image", 0
    for seed in range(200):
        rng = random.Random(f"{kind} {seed}")
        data = bytearray(sound[kind])
        for _ in range(rng.randrange(1, 4)):
            where = rng.choice((64, 4096, len(data)))
            at = rng.randrange(min(where, len(data)))
            what = rng.randrange(4)
            if what == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                del data[at : at + rng.randrange(1, 5000)]
            elif what == 2:
                data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8)))
            else:
                del data[rng.randrange(len(data)) :]
            if not data:
                data = bytearray(1)
        path.write_bytes(data)
        gva = rng.choice((0, 0x400123, 0x7FF000, 1 << 47, 0xFFFF800000000000))
        more = {} if kind == "dump" else {"cr3": ROOT, "mode": "64"}
        try:
            explain(images.machine(path, gva=gva, **more), gva)
            images.open_dump(path).image(**more)
        except refusals as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            works += 1
    assert 0 < works < 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d[:100], "the file is cut short"),
        (lambda d: d[:-5000], "the file is cut short"),
        (lambda d: d[:16] + b"\2\0" + d[18:], "this is another ELF file"),
        (lambda d: d[:18] + b"\xb7\0" + d[20:], "this is another ELF file"),
        (lambda d: d[:5] + b"\2" + d[6:], "little-endian"),
    ],
)
def test_cores_that_are_none(change, said, sound, tmp_path):
    (tmp_path / "core").write_bytes(change(sound["dump"]))
    assert said in refused("walk", tmp_path / "core", 0)


def test_cores_without_the_note_of_qemu(sound, tmp_path):
    (tmp_path / "core").write_bytes(sound["dump"].replace(b"QEMU", b"BOCH"))
    assert "--cr3 and --mode needed" in refused("walk", tmp_path / "core", 0)
    run("walk", tmp_path / "core", 0, "--cr3", ROOT, "--mode", "64")


def test_every_mode_has_its_registers():
    for mode in FORMATS:
        dump = images.Dump("a", "b", ((0, 4096, 0),))
        assert (
            images._mode({"cr4": FORMATS[mode].cr4, "efer": FORMATS[mode].efer | (FORMATS[mode].efer & 256) << 2})
            == mode
        )
        with pytest.raises(sc.ConfigError, match="mode"):
            dump.image(0, "16")
