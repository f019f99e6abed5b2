"""Guests' page tables by way of the C functions: the memory is what sc.PageTables makes of it."""

import ctypes

import numpy as np
import pytest
from capi import API, GP, OK, C, Config, Entry, Mapping, Tables, error, made

import shadowcore as sc

MODES = {"32": 2, "pae": 3, "64": 4, "la57": 5}
SIZE = 16 << 20
LETTERS = ((C["SC_RIGHT_WRITE"], "w"), (C["SC_RIGHT_EXECUTE"], "x"), (C["SC_RIGHT_USER"], "u"))


class Built:
    """Tables by C in one VM, by Python in another."""

    def __init__(self, mode="64", frames=(1, 200), design=2, start=True):
        self.memory = sc.embed.allocate(SIZE)
        self.vm = ctypes.c_uint64()
        config = made(Config, design=design, memory=self.memory.ctypes.data, memory_size=SIZE)
        assert API.vm_create(config, self.vm) == OK, error()
        self.tables = made(Tables, mode=MODES[mode], next_gfn=frames[0], frames=frames[1])
        self.twin = sc.VM(SIZE)
        self.python = sc.PageTables(self.twin, mode, allocate=range(frames[0], sum(frames)))
        if start:
            assert self.map(0x1000, 0, 0x1000, C["SC_RIGHT_EXECUTE"]) == OK, error()
            self.python.map(0x1000, 0, 0x1000, "rx")

    def map(self, gva, gpa, size, rights, **fields):
        return API.tables_map(self.vm, self.tables, made(Mapping, gva=gva, gpa=gpa, size=size, rights=rights, **fields))

    def same(self):
        assert (self.memory == self.twin.memory.bytes).all()
        assert self.tables.root == self.python.root
        used = len(self.python.tables)
        assert (self.tables.next_gfn, self.tables.frames) == (1 + used, 200 - used)

    def close(self):
        assert API.vm_destroy(self.vm) == OK


@pytest.mark.parametrize("mode", MODES)
def test_as_python_builds_them(mode):
    built, random = Built(mode), np.random.default_rng(7)
    refused = 0
    for _ in range(60):
        gva = int(random.integers(0x400, 0x2000)) << 12
        size = int(random.integers(1, 40)) << 12
        rights = int(random.integers(0, 8)) | (C["SC_RIGHT_EXECUTE"] if mode == "32" else 0)
        letters = "r" + "".join(letter for bit, letter in LETTERS if rights & bit)
        what = int(random.integers(0, 4))
        told = ""
        try:
            if what <= 1:
                gpa = int(random.integers(0, 0x800)) << 12
                flags = [bool(flag) for flag in random.integers(0, 2, 3)]
                page = (0, 4096)[int(random.integers(0, 2))]
                rc = built.map(
                    gva, gpa, size, rights, global_=flags[0], accessed=flags[1], dirty=flags[2], page_size=page
                )
                built.python.map(
                    gva, gpa, size, letters, page or "auto", global_=flags[0], accessed=flags[1], dirty=flags[2]
                )
            elif what == 2:
                rc = API.tables_unmap(built.vm, built.tables, gva, size)
                built.python.unmap(gva, size)
            else:
                rc = API.tables_protect(built.vm, built.tables, made(Mapping, gva=gva, size=size, rights=rights))
                built.python.protect(gva, size, letters)
            assert rc == OK, error()
        except sc.ConfigError as raised:
            refused += 1
            told = f"ConfigError: {raised}"
        if told:
            assert (rc, error()) == (C["SC_E_ARGUMENT"], told)
        built.same()
        entry = made(Entry, level=C["SC_ANY_LEVEL"])
        assert API.tables_entry(built.vm, built.tables, gva, entry) == OK, error()
        assert (entry.level, entry.gpa, entry.value) == built.python.walk(gva)[-1]
    assert 0 < refused < 40
    built.close()


def test_a_guest_that_runs():
    """Tables are mapped while the guest's shadow stands; the guest sees it."""
    built = Built()
    assert API.tables_activate(built.vm, 0, built.tables) == OK, error()
    built.python.activate(built.twin.vcpus[0])
    cpu = sc.embed.from_handle(built.vm.value).vcpus[0]
    twin = built.twin.vcpus[0]
    rights = C["SC_RIGHT_WRITE"] | C["SC_RIGHT_USER"]
    for n in range(20):
        gva = 0x40_0000 + n * 0x3000
        assert built.map(gva, 0x20_0000 + n * 0x1000, 0x1000, rights, bits=0) == OK
        built.python.map(gva, 0x20_0000 + n * 0x1000, 0x1000, "rwu")
        cpu.write(gva, n)
        twin.write(gva, n)
    entry = made(Entry, level=1)
    assert API.tables_entry(built.vm, built.tables, 0x40_0000, entry) == OK
    assert API.store(built.vm, entry.gpa, bytes(8), 8) == OK
    built.python.set_entry(0x40_0000, 1, 0)
    for one in (cpu, twin):
        with pytest.raises(sc.PageFault):
            one.read(0x40_0000)
    built.same()
    vm = sc.embed.from_handle(built.vm.value)
    assert vm.stats.as_dict() == built.twin.stats.as_dict()
    assert vm.audit().ok
    built.close()


def test_what_cannot_be():
    built = Built()
    before, tables = built.memory.copy(), bytes(built.tables)
    bad = C["SC_E_ARGUMENT"]
    for call, text in (
        (lambda: built.map(0x1001, 0, 4096, 2), "va"),
        (lambda: built.map(1 << 47, 0, 4096, 2), "canonical"),
        (lambda: built.map(0x5000, 0, 4096, 8), "SC_RIGHT_"),
        (lambda: built.map(0x5000, 0, 4096, 2, bits=7), "rights must be 0"),
        (lambda: built.map(0x5000, 0, 4096, 2, pkey=16), "pkey"),
        (lambda: built.map(0x5000, 0, 4096, 2, dirty=2), "dirty"),
        (lambda: built.map(0x5000, 0, 4096, 2, page_size=5), "page_size"),
        (lambda: built.map(0x5000, 0, 1 << 40, 2, page_size=4096), "out of frames"),
        (lambda: API.tables_entry(built.vm, built.tables, 0x40_0000_0000, made(Entry, level=1)), "no table of level 1"),
        (lambda: API.tables_activate(built.vm, 3, built.tables), "vcpu"),
        (lambda: API.tables_unmap(built.vm, made(Tables, mode=4, next_gfn=1, frames=9), 0, 4096), "none yet"),
        (lambda: API.tables_map(built.vm, made(Tables, mode=6), made(Mapping)), "SC_TABLES_"),
        (lambda: API.tables_map(built.vm, made(Tables, mode=4, frames=1 << 60), made(Mapping)), "52 address bits"),
    ):
        assert call() == bad
        assert text in error()
    wrong = made(Mapping, gva=0x5000, size=4096)
    wrong.reserved[3] = 1
    assert API.tables_map(built.vm, built.tables, wrong) == bad
    null = C["SC_E_NULL"]
    assert API.tables_map(built.vm, None, made(Mapping)) == API.tables_map(built.vm, built.tables, None) == null
    assert API.tables_entry(built.vm, built.tables, 0, None) == API.tables_activate(built.vm, 0, None) == null
    for of in (Tables, Mapping, Entry):
        short = made(of)
        short.struct_size -= 1
        calls = {
            Tables: lambda s: API.tables_map(built.vm, s, made(Mapping)),
            Mapping: lambda s: API.tables_protect(built.vm, built.tables, s),
            Entry: lambda s: API.tables_entry(built.vm, built.tables, 0, s),
        }
        assert calls[of](short) == C["SC_E_STRUCT"]
    gone = ctypes.c_uint64(7)
    assert API.tables_map(gone, built.tables, made(Mapping)) == C["SC_E_HANDLE"]
    assert (built.memory == before).all()
    assert bytes(built.tables) == tables
    built.close()


def test_a_processor_that_refuses():
    """The loads fault as the guest's would: five levels that the processor has not."""
    memory = sc.embed.allocate(SIZE)
    vm = ctypes.c_uint64()
    has = C["SC_FEATURE_NX"] | C["SC_FEATURE_PSE36"]
    config = made(Config, design=2, memory=memory.ctypes.data, memory_size=SIZE, features=has)
    assert API.vm_create(config, vm) == OK
    tables = made(Tables, mode=5, next_gfn=1, frames=100)
    assert API.tables_map(vm, tables, made(Mapping, gva=0, size=4096)) == OK
    assert API.tables_activate(vm, 0, tables) == GP
    assert API.vm_destroy(vm) == OK
