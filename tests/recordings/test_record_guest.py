"""`shadowcore record-guest`: a guest whose every step is known is recorded as it is written, and replays."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import COMMAND, ENVIRONMENT, refused
from emulated import EMULATORS, modes, modes_command, needs

import shadowcore as sc
from shadowcore.recording import emulated, plugin
from shadowcore.recording.kinds import (
    ACCESS,
    CPL_KNOWN,
    FETCH,
    INVLPG,
    LOAD_CR,
    LOAD_CR3,
    LOAD_EFER,
    MARK,
    SNAPSHOT,
    STORE,
    TABLE,
    TABLE_END,
    USER,
    WRITE,
)
from shadowcore.recording.reader import Reader

DESIGNS = ("native", "flush", "cached", "unsync")
CODE = 0x100  # the page of the guest's code, stack and descriptors

B1, B2, B4, B8 = (n << 4 | CPL_KNOWN for n in (1, 2, 3, 4))  # sizes of accesses
ROOT = 1 << 4
PG, NO_PG = 0x80010011, 0x10011


def stored(gpa, value, level, size, va=None, access=None):
    """A store to a table: the access that carries it, and the store. size: of the access, access: its first part's."""
    bits = {1: B1, 2: B2, 4: B4, 8: B8}
    part = 0 if size == 8 else size << 4
    return [
        (ACCESS, bits[access or size] | WRITE, gpa if va is None else va, gpa),
        (STORE, level | part, gpa, value),
    ]


# What recorder/guests/modes.S does, but for fetches and accesses to its own page, and the words of tables that begin.
EXPECTED = [
    (TABLE, 2 | ROOT, 0x200000, 0),
    (TABLE, 1, 0x201000, 0),
    (TABLE, 1, 0x200000, 0),  # the directory is a table as well
    (LOAD_CR3, 0, 0x200000, 0),
    (ACCESS, B4 | WRITE, 0x402000, 0x402000),
    *stored(0x201014, 0x00500003_00404003, 1, 4),
    (INVLPG, 0, 0x405000, 0),
    (ACCESS, B4, 0x405010, 0x500010),
    *stored(0x201018, 0x00407003_00406023, 1, 1),
    *stored(0x20101C, 0x00400023_00406023, 1, 2, va=0xFFC0101C),
    (INVLPG, 0, 0x405000 + 4 * 8 + 0x1234, 0),
    (ACCESS, B4, 0x201020, 0x201020),  # an exchange reads first
    *stored(0x201020, 0x00409003_00508003, 1, 4),
    *stored(0x201024, 0x00509003_00508003, 1, 4),
    *stored(0x201028, 0x0040B003_0040A203, 1, 4),
    *stored(0x20102A, 0x00400000_0007A203, 1, 4),
    (LOAD_CR3, 0, 0x200000, 0),
    *stored(0x200004, 0xE3, 2, 4),  # the processor has set A and D in the first entry
    (TABLE_END, 1, 0x201000, 0),
    *stored(0x201000, 0x00401003_00400000, 1 | SNAPSHOT, 1),  # late
    (LOAD_CR, 0, NO_PG, 0x10),
    (ACCESS, B4 | WRITE, 0x210020, 0x210020),
    (ACCESS, B4 | WRITE, 0x211000, 0x211000),
    (ACCESS, B4 | WRITE, 0x212000, 0x212000),
    (LOAD_CR, 0, NO_PG, 0x30),
    (LOAD_CR3, 0, 0x210020, 0),
    (TABLE_END, 2, 0x200000, 0),
    (TABLE_END, 1, 0x200000, 0),
    (TABLE, 3 | ROOT, 0x210000, 0),
    (TABLE, 2, 0x211000, 0),
    (TABLE, 1, 0x212000, 0),
    (LOAD_CR, 0, PG, 0x30),
    (ACCESS, B4, 0x400000, 0x400000),
    *stored(0x210028, 0x211001, 3, 4),
    (LOAD_CR3, 0, 0x210020, 0),
    (ACCESS, B4, 0x40400000, 0x400000),
    (LOAD_CR, 0, NO_PG, 0x30),
    (ACCESS, B4 | WRITE, 0x220000, 0x220000),
    (ACCESS, B4 | WRITE, 0x221000, 0x221000),
    (ACCESS, B4 | WRITE, 0x222000, 0x222000),
    (ACCESS, B4 | WRITE, 0x223000, 0x223000),
    (LOAD_CR3, 0, 0x220000, 0),
    (LOAD_EFER, 0, 0x900, 0),
    (TABLE_END, 3, 0x210000, 0),
    (TABLE_END, 2, 0x211000, 0),
    (TABLE_END, 1, 0x212000, 0),
    (TABLE, 4 | ROOT, 0x220000, 0),
    (TABLE, 3, 0x221000, 0),
    (TABLE, 2, 0x222000, 0),
    (TABLE, 1, 0x223000, 0),
    (LOAD_CR, 0, PG, 0x30),
    (ACCESS, B4, 0x400000, 0x400000),
    *stored(0x223008, 0x401007, 1, 8),
    (ACCESS, B8, 0x223010, 0x223010),
    *stored(0x223010, 0, 1, 8),
    *stored(0x22301C, 0xFFFFFFFF_00000000, 1, 4, access=8),
    *stored(0x223020, 0xFFFFFFFF, 1, 4, access=8),
    (INVLPG, 0, 0x40000C, 0),
    (INVLPG, 0, "there", 0),
    (MARK, 0, 7, 0),
    (ACCESS, B4 | USER | 3 << 8, 0x401000, 0x401000),
    (ACCESS, B4 | USER | WRITE | 3 << 8, 0x401FFC, 0x401FFC),
]


@pytest.fixture(scope="module", params=EMULATORS)
def emulator(request):
    needs(request.param)
    return request.param


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return modes(tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def recorded(emulator, kernel, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "modes.screc"
    writer = emulated.record(modes_command(emulator, kernel), out)
    assert writer.complete
    return out


def test_each_step_is_recorded(recorded):
    loaded = sc.trace.load(recorded)
    assert (loaded.cr0, loaded.cr4, loaded.efer, loaded.nframes) == (PG, 0x10, 0, 4096)
    fetch = (loaded.kind == ACCESS) & (loaded.flags & FETCH != 0)
    own = (loaded.kind == ACCESS) & (loaded.addr >> np.uint64(12) == CODE)
    shown = np.flatnonzero(~fetch & ~own & ~loaded.snapshot)
    columns = (loaded.kind, loaded.flags, loaded.addr, loaded.value)
    found = [tuple(int(column[record]) for column in columns) for record in shown]
    expected = list(EXPECTED)
    there = expected.index((INVLPG, 0, "there", 0))
    assert found[there][2] >> 12 == CODE
    expected[there] = found[there]
    assert found == expected
    # The guest's page is fetched from again after each load, after INVLPG of the page itself, and in user mode.
    assert set((loaded.addr[fetch] >> np.uint64(12)).tolist()) == {CODE}
    loads = np.isin(loaded.kind, (LOAD_CR3, LOAD_CR))
    assert fetch.sum() == loads.sum() + 2
    assert (loaded.flags[fetch] & USER != 0).sum() == 1


def test_tables_begin_with_their_words(recorded):
    loaded = sc.trace.load(recorded)
    words = {}
    for record in np.flatnonzero(loaded.snapshot).tolist():
        words.setdefault(int(loaded.addr[record]) >> 12, {})[int(loaded.addr[record]) & 4095] = int(
            loaded.value[record]
        )
    accessed = 0x20 | 0x40  # what the processor sets while they serve
    assert {at: word & ~accessed for at, word in words[0x200].items()} == {0: 0x201003_00000083, 4088: 0x200003 << 32}
    assert words[0x210] == {0x20: 0x211001}
    assert {at: word & ~accessed for at, word in words[0x211].items()} == {0: 0x83, 8: 0x200083, 16: 0x212003}
    assert words[0x223] == {0: 0x400007}
    assert len(words[0x201]) == 512


@pytest.mark.parametrize("design", DESIGNS)
def test_it_replays(recorded, design):
    result = sc.trace.replay(sc.trace.open_recording(recorded), design, audit_every=10)
    assert (result.faults, result.gpa_mismatches, result.violations) == (0, 0, ())
    assert result.whole.records == sc.trace.load(recorded).operations


def test_instructions_are_counted(recorded):
    loaded = sc.trace.load(recorded)
    mark = int(np.flatnonzero(loaded.kind == MARK)[0])
    between = loaded.insns.astype(np.uint64).cumsum()
    lpg = np.flatnonzero(loaded.kind == INVLPG)
    # invlpg, invlpg, mov, mov, jmp, cpuid: the record of a block's first instruction stands before it.
    assert between[mark] - between[lpg[-1]] == 3
    assert int(loaded.insns[0]) == 0


def test_instructions_after_a_fault_are_not_counted_where_the_emulator_tells_of_it(emulator, tmp_path):
    """5906 between the marks; the 53 after each of 100 faults, in the same block, count where it is told of none."""
    out = tmp_path / "faults.screc"
    emulated.record(modes_command(emulator, modes(tmp_path, "faults")), out)
    loaded = sc.trace.load(out)
    executed = loaded.insns.astype(np.int64).cumsum()[loaded.kind == MARK]
    tells = plugin.emulator(emulator).version >= (10, 2)
    assert np.diff(executed).tolist() == [5906 + (0 if tells else 53 * 100)]


def test_nothing_after_the_last_record_is_one():
    """An emulator goes on for a moment after the plug-in has told of the end."""
    ours, theirs = os.pipe()
    record = np.array([(3, 0, 0, 1, 0x1000, 0)], emulated.RECORD)
    end = np.array([(emulated.END, 0, 0, 0, 0, 1)], emulated.RECORD)
    parts = [record.tobytes() + end.tobytes(), b"SCGUEST1" * 6, record.tobytes()]
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        stream = emulated._Stream(ours, child, None, None)
        found = []
        os.write(theirs, parts[0])
        for records in stream.records():
            found.append(records.copy())
            for part in parts[1:]:
                os.write(theirs, part)
            os.close(theirs)
    os.close(ours)
    assert stream.complete
    assert np.concatenate(found).tolist() == record.tolist()


def test_limits(emulator, kernel, tmp_path):
    out = tmp_path / "short.screc"
    command = modes_command(emulator, kernel, ends=False)
    writer = emulated.record(command, out, instructions=40, marks={7: "long mode", 9: "never"})
    assert writer.complete
    assert 0 < sc.trace.load(out).instructions <= 40
    began = time.monotonic()
    writer = emulated.record(modes_command(emulator, kernel, ends=False), out, seconds=12)
    assert writer.complete
    assert time.monotonic() - began >= 12
    assert sc.trace.load(out).counts["marks"] == 1
    assert "mark-7" in sc.trace.open_recording(out).phases


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_recorded_is_kept(emulator, kernel, tmp_path, how):
    """Ctrl-C, a request to end, and an emulator that dies. Nothing is left behind."""
    out = tmp_path / "kept.screc"
    line = [*COMMAND, "record-guest", "-o", str(out), "--", *map(str, modes_command(emulator, kernel, ends=False))]
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    child = 0
    deadline = time.monotonic() + 100
    try:
        while not os.path.exists(f"{out}.partial") and time.monotonic() < deadline:
            time.sleep(0.1)  # until paging is on
        time.sleep(2)
        child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        shared = re.search(r"mem-path=([^,\0]+)/ram", Path(f"/proc/{child}/cmdline").read_text())[1]
        os.kill(child if how == signal.SIGKILL else process.pid, how)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        if child and Path(f"/proc/{child}/cmdline").exists():
            os.kill(child, signal.SIGKILL)
    assert process.returncode == (1 if how == signal.SIGKILL else 130), said
    assert not Path(shared).exists()
    if how != signal.SIGKILL:
        with Reader(out) as reader:
            assert not reader.complete
            assert reader.records > 500
    assert not os.path.exists(f"{out}.partial")


def test_the_command_says_what_comes_next(emulator, kernel, tmp_path):
    out = tmp_path / "said.screc"
    line = [*COMMAND, "record-guest", "-o", str(out), "--json", "--", *map(str, modes_command(emulator, kernel))]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["records"] == sc.trace.load(out).operations
    line.remove("--json")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"shadowcore compare {out}" in done.stderr


def script(folder, text):
    path = folder / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def qemu_like(folder, version, plugins=True):
    told = f"[ $1 = --version ] && echo 'QEMU emulator version {version} (a test)'\n"
    return script(folder, told + ("[ $1 = -help ] && echo '-plugin [file=]<file>'" if plugins else ""))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-accel", "kvm"], "-accel kvm"),
        (["-M", "q35,accel=kvm"], "q35,accel=kvm"),
        (["-machine", "pc,memory-backend=mine"], "memory-backend"),
        (["-plugin", "other.so"], "-plugin"),
        (["-m", "4G"], "2816 MiB"),
        (["-m", "some"], "'some'"),
        (["-m", "9" * 400], "a size that stays"),
        (["-m", "9" * 18 + "T"], "2816 MiB"),
        (["-m", "size=128M,slots=2,maxmem=1G"], "slots"),
    ],
)
def test_arguments_that_do_not_go_with_recording(tmp_path, arguments, named):
    output = refused("record-guest", "-o", tmp_path / "x.screc", "--", qemu_like(tmp_path, "7.2.0"), *arguments)
    assert named in output
    assert list(tmp_path.glob("*.screc*")) == []


@pytest.mark.parametrize("version", ["6.2.0", "7.1.0", "8.2.0", "9.2.1"])
def test_other_versions_are_refused(tmp_path, version):
    output = refused("record-guest", "-o", tmp_path / "x.screc", "--", qemu_like(tmp_path, version))
    assert version.rpartition(".")[0] in output


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    out = tmp_path / "x.screc"
    assert "not installed" in refused("record-guest", "-o", out, "--", "no-such-qemu")
    assert "no system emulator" in refused("record-guest", "-o", out, "--", script(tmp_path, "echo hello"))
    assert "without plug-ins" in refused("record-guest", "-o", out, "--", qemu_like(tmp_path, "7.2.0", plugins=False))
    qemu = qemu_like(tmp_path, "10.0.2")
    monkeypatch.setenv(plugin.SOURCE, str(tmp_path))
    assert plugin.SOURCE in refused("record-guest", "-o", out, "--", qemu)
    for name in (*plugin.COMMON, *plugin.HEADERS):  # all but the back ends
        (tmp_path / name).touch()
    assert plugin.SOURCE in refused("record-guest", "-o", out, "--", qemu)
    monkeypatch.setenv(plugin.SOURCE, "a" * 5000)
    assert len(refused("record-guest", "-o", out, "--", qemu)) < 500
    monkeypatch.delenv(plugin.SOURCE)
    if not plugin.source_folder().is_dir():
        pytest.skip("the source of the recorder's plug-in is not here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "C compiler" in refused("record-guest", "-o", out, "--", qemu)
    monkeypatch.setenv("CC", "false")
    assert "does not build" in refused("record-guest", "-o", out, "--", qemu)
    assert "power of two" in refused("record-guest", "-o", out, "--filter", 24, "--", qemu)
    assert "'one' is not the number of a mark" in refused("record-guest", "-o", out, "--mark", "one=boots", "--", qemu)
    for given in (("1=boot",), ("1=a", "2=a")):
        options = [word for one in given for word in ("--mark", one)]
        assert "marks: a name of its own" in refused("record-guest", "-o", out, *options, "--", qemu)


def test_a_guest_without_paging(emulator, tmp_path):
    boot = tmp_path / "boot"
    boot.write_bytes(b"\xb0\x31\xe6\xf4".ljust(510, b"\0") + b"\x55\xaa")  # mov al, 0x31; out 0xf4, al
    command = [
        emulator,
        "-display",
        "none",
        "-device",
        "isa-debug-exit,iobase=0xf4",
        "-drive",
        f"file={boot},format=raw",
    ]
    assert "paging" in refused("record-guest", "-o", tmp_path / "x.screc", "--", *command)
    assert not (tmp_path / "x.screc").exists()
