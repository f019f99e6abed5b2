"""The table of C functions: against the same VM driven from Python, and against every misuse."""

import ctypes
import itertools
import math
import shutil
import subprocess
import threading

import numpy as np
import pytest
from capi import (
    API,
    EVENT,
    PROTOTYPES,
    STRUCTS,
    TEXT,
    Access,
    Accesses,
    AuditResult,
    C,
    Config,
    Counters,
    Guest,
    MemorySlot,
    Outcome,
    Prices,
    error,
    made,
    structure,
)

import shadowcore as sc
from shadowcore.engine.counters import COUNTERS, EXIT_REASONS

DATA = 0x40_0000
TABLES = 0x80_0000
DESIGNS = ("native", "flush", "cached", "kvm-2007")
OK, PF, GP, MMIO = 0, 1, 2, 3


@pytest.fixture
def guest():
    made_guest = Guest()
    yield made_guest
    API.vm_destroy(made_guest.vm)


def test_the_table_is_that_of_the_header():
    assert API.abi_version == C["SC_ABI_VERSION"] == 1
    assert API.version.decode() == sc.__version__
    assert API.struct_size == 16 + 8 * len(PROTOTYPES)
    body = TEXT[TEXT.index("typedef struct sc_api {") :]
    assert [name for name in PROTOTYPES if f"(*{name})(" in body] == list(PROTOTYPES)
    assert body.count("(*") == len(PROTOTYPES)


def test_counters_are_the_engines_in_its_order():
    names = [name for name, _ in Counters._fields_]
    assert names == ["struct_size", "reserved", "exits", *COUNTERS]
    assert C["SC_EXITS"] == len(EXIT_REASONS)
    assert [C[f"SC_EXIT_{name.upper()}"] for name in EXIT_REASONS] == list(range(len(EXIT_REASONS)))


def test_codes_are_the_engines():
    for name in ("READ", "WRITE", "FETCH", "CMPXCHG", "XCHG", "ADD", "AND", "OR", "XOR"):
        assert C[f"SC_{name}"] == sc.Op[name]
    assert [C[f"SC_EVENT_{name.upper()}"] for name in sc.embed.EVENTS] == list(range(C["SC_EVENTS"]))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", ["32", "pae", "64", "la57"])
@pytest.mark.parametrize("data", [True, False])
def test_accesses_are_those_of_python(design, mode, data):
    """Random loads, stores, fetches and read-modify-writes, some across pages, to tables, to nowhere."""
    guest = Guest(design, mode)
    rng = np.random.default_rng(7)
    codes = [C["SC_READ"]] * 5 + [C["SC_WRITE"]] * 4 + [C["SC_FETCH"]] + list(range(C["SC_CMPXCHG"], C["SC_XOR"] + 1))
    ops = np.zeros(1, dtype=[*((n, sc.OP_DTYPE.fields[n][0]) for n in sc.OP_DTYPE.names), ("expected", "<u8")])
    for i in range(1500):
        op = ops[0]
        op["op"], op["size"], op["user"] = rng.choice(codes), rng.choice([1, 2, 4, 8]), rng.integers(2)
        base = rng.choice([DATA, DATA, DATA, TABLES, 0, 0x8000_0000_0000, DATA + (256 << 12) - 4])
        op["addr"] = int(base) + int(rng.integers(0, 20 << 12) if base in (DATA, TABLES) else 0)
        # What stores put into tables keeps to bits that make entries: a new table, or none.
        op["value"] = rng.integers(0, 1 << 62) if base == DATA else 0
        if not data and op["op"] == C["SC_WRITE"]:
            op["value"] = 0
        result = guest.cpu.run(ops, data=data)
        rc, out = guest.access(
            int(op["op"]), int(op["addr"]), int(op["size"]), int(op["user"]), int(op["value"]), data=data
        )
        assert rc == result.outcome[0], (i, op, error())
        assert out.gpa == result.gpa[0]
        assert (out.exits, out.emulated) == (result.exits[0], result.emulated[0])
        if rc == PF:
            assert out.error_code == result.error_code[0]
        if rc == OK:
            assert out.value[0] == (result.value[0] if data else 0)
            assert out.host == guest.memory.ctypes.data + out.gpa
            assert out.hpa - out.gpa == guest.twin.memory.ram_hpa
            assert out.references == result.stats.walk_references
            assert out.guest_references == result.stats.guest_walk_references
        else:
            assert out.host is None
            assert out.hpa == 2**64 - 1
        if i % 300 == 0:
            guest.same()
    guest.same()
    guest.close()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", ["32", "pae", "64"])
def test_sizes_and_rights_of_pages(design, mode):
    """Small and large pages, again and again: from the tables and from what was noted of them."""
    guest = Guest(design, mode, start=False)
    large = 4 << 20 if mode == "32" else 2 << 20
    pages = [(0x40_0000, 12, "rwxu"), (0x40_5000, 12, "rwxu"), (0x80_0000, 12, "rw")]
    guest.tables.map(0x1000_0000, 0x40_0000, large, "rxu" if mode == "32" else "ru", page_size=large)
    pages.append((0x1000_0000 + 0x1234, 22 if mode == "32" else 21, "ru"))
    guest.memory[:] = guest.twin.memory.bytes
    for name, value in guest.tables.registers.items():
        assert API.register_load(guest.vm, 0, C[f"SC_{name.upper()}"], value) == 0
    for _ in range(3):
        for (gva, shift, rights), brief in itertools.product(pages, (True, False)):
            rc, out = guest.access(C["SC_READ"], gva, flags=C["SC_BRIEF"] * brief)
            assert rc == OK
            found = made(Outcome)
            assert API.translate(guest.vm, made(Access, gva=gva, kind=0, size=8), found) == OK
            assert (found.gpa, found.page_shift, found.host) == (out.gpa, shift, out.host)
            if brief:
                assert (out.page_shift, out.rights) == (0, 0)
                continue
            assert out.page_shift == shift
            # Mode 32 has no execute-disable.
            wanted = 2 * ("w" in rights) | 4 * ("u" in rights)
            assert out.rights & 6 == found.rights & 6 == wanted
            assert mode == "32" or out.rights & 1 == ("x" in rights)
    guest.close()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("n", [0, 1, 5000])
@pytest.mark.parametrize("data", [True, False])
def test_many_are_one_by_one(design, n, data):
    guest = Guest(design)
    rng = np.random.default_rng(n)
    gva = (DATA + rng.integers(0, 260 << 12, n)).astype(np.uint64)
    ops = np.zeros(n, dtype=sc.OP_DTYPE)
    ops["op"], ops["size"], ops["addr"] = rng.integers(0, 3, n), rng.choice([1, 2, 4, 8], n), gva
    ops["user"], ops["value"] = rng.integers(0, 2, n), rng.integers(0, 1 << 62, n)
    columns = {"gva": gva}
    for name, field in (("kind", "op"), ("size", "size"), ("user", "user"), ("value", "value")):
        columns[name] = np.ascontiguousarray(ops[field])
    out = {name: np.full(n, 7, dtype=kind) for name, kind in RESULTS.items()}
    many = made(Accesses, count=n, flags=int(data))
    for name, array in (*columns.items(), *out.items()):
        setattr(many, name, array.ctypes.data)
    assert API.access_many(guest.vm, many) == OK
    assert many.done == n
    result = guest.cpu.run(ops, data=data)
    for name in ("gpa", "outcome", "error_code", "exits", "emulated"):
        assert (out[name] == getattr(result, name)).all(), name
    if data:
        assert (out["loaded"] == result.value).all()
    guest.same()
    # The same with one value for all, and no results asked for.
    many = made(Accesses, count=n, gva=gva.ctypes.data, all_kind=0, all_size=4, all_user=1)
    assert API.access_many(guest.vm, many) == OK
    ops["op"], ops["size"], ops["user"] = 0, 4, 1
    guest.cpu.run(ops, data=False)
    guest.same()
    guest.close()


RESULTS = {"gpa": "u8", "loaded": "u8", "error_code": "u2", "exits": "u2", "outcome": "u1", "emulated": "u1"}


def test_registers(guest):
    value = ctypes.c_uint64()
    for name in ("cr0", "cr2", "cr3", "cr4", "efer", "pkru", "cpl"):
        assert API.register_read(guest.vm, 0, C[f"SC_{name.upper()}"], value) == OK
        assert value.value == getattr(guest.cpu, name), name
    assert API.register_load(guest.vm, 0, C["SC_CR4"], 1 << 40) == GP
    with pytest.raises(sc.GeneralProtection):
        guest.cpu.cr4 = 1 << 40
    assert API.register_load(guest.vm, 0, C["SC_CR2"], 0x1234) == OK
    assert API.register_read(guest.vm, 0, C["SC_CR2"], value) == OK
    assert value.value == 0x1234
    for reg, bad in (("SC_CPL", 1), ("SC_AC", 2), ("SC_PKRU", 1 << 32)):
        assert API.register_load(guest.vm, 0, C[reg], bad) == C["SC_E_ARGUMENT"]
    assert API.register_load(guest.vm, 0, 99, 0) == C["SC_E_ARGUMENT"]
    assert API.register_read(guest.vm, 0, 99, value) == C["SC_E_ARGUMENT"]
    assert API.register_load(guest.vm, 1, C["SC_CR3"], 0) == C["SC_E_ARGUMENT"]
    assert "vcpu" in error()
    assert API.invlpg(guest.vm, 0, DATA) == OK
    guest.cpu.invlpg(DATA)
    guest.same()


def test_stores_that_the_caller_makes_itself(guest):
    """To a guest table, through the host pointer: told of, the shadow follows."""
    assert guest.access(C["SC_READ"], DATA)[0] == OK
    entry = guest.tables.entry(DATA)
    rc, out = guest.access(C["SC_WRITE"], TABLES + entry.gpa - 16 * 4096, data=False)
    assert (rc, out.emulated) == (OK, 1)
    assert out.gpa == entry.gpa
    ctypes.memset(out.host, 0, 8)
    assert API.stored(guest.vm, out.gpa, 8) == OK
    assert guest.access(C["SC_READ"], DATA)[0] == PF
    assert guest.audit().violations == 0
    # And a device's store puts it back.
    assert API.store(guest.vm, entry.gpa, (0x20_0000 | 7).to_bytes(8, "little"), 8) == OK
    assert guest.access(C["SC_READ"], DATA)[0] == OK
    before = guest.memory[0x20_0000 : 0x20_0000 + 10000].copy()
    assert API.store(guest.vm, 0x20_0FFF, before.tobytes(), 10000) == OK
    assert (guest.memory[0x20_0FFF : 0x20_0FFF + 10000] == before).all()
    assert guest.audit().violations == 0


def test_host_addresses(guest):
    where = ctypes.c_void_p()
    assert API.host_address(guest.vm, 0x1234, where) == OK
    assert where.value == guest.memory.ctypes.data + 0x1234
    assert API.host_address(guest.vm, 8 << 20, where) == MMIO
    assert where.value is None


def test_slots_devices_and_a_tlb():
    slots = (MemorySlot * 2)(MemorySlot(0, 1 << 20), MemorySlot(1 << 32, 3 << 20))
    config = made(Config, design=C["SC_CACHED"], memory_size=4 << 20, n_slots=2, vcpus=2)
    config.slots = ctypes.addressof(slots)
    config.tlb_entries[:], config.tlb_ways[:] = (64, 32, 4), (4, 4, 4)
    vm = ctypes.c_uint64()
    assert API.vm_create(config, vm) == OK, error()
    made_vm = sc.embed.from_handle(vm.value)
    assert made_vm.memory.slots == (sc.MemorySlot(0, 1 << 20), sc.MemorySlot(1 << 32, 3 << 20))
    assert made_vm.tlb == sc.TLB()
    out = made(Outcome)
    assert API.access(vm, made(Access, gva=0x20_0000, size=4, vcpu=1), out) == MMIO
    assert (out.outcome, out.gpa) == (MMIO, 0x20_0000)
    for _ in range(2):
        assert API.access(vm, made(Access, gva=0x8_0000, size=4), out) == OK
    assert API.vm_destroy(vm) == OK


def test_settings():
    every = C["SC_SETTING_ZERO"]
    config = made(
        Config,
        design=C["SC_CACHED"],
        memory_size=1 << 20,
        pool_pages=64,
        min_free=every,
        refill=30,
        flood_threshold=every,
        quirks=int(sc.Quirk.PDE_WRITE),
        features=C["SC_FEATURE_NX"],
        maxphyaddr=36,
    )
    vm = ctypes.c_uint64()
    assert API.vm_create(config, vm) == OK, error()
    found = sc.embed.from_handle(vm.value)
    wanted = sc.Shadow.cached(pool_pages=64, min_free=0, refill=30, flood_threshold=None, quirks=sc.Quirk.PDE_WRITE)
    assert found.mmu.design == wanted
    names = ("gbpages", "la57", "pse36", "smep", "smap", "pku", "pcid", "umip", "fsgsbase", "xsave")
    assert found.features == sc.Features(maxphyaddr=36, **dict.fromkeys(names, False))
    del found
    assert API.vm_destroy(vm) == OK


@pytest.mark.parametrize("design", [C["SC_NATIVE"], C["SC_FLUSH"], C["SC_CACHED"], C["SC_KVM_2007"]])
def test_bits_that_processors_ignore(design):
    """Loaded without effect, and refused with the quirk; CR3 keeps them, in 32 bits."""
    for quirks in (0, int(sc.Quirk.KVM_2007)):
        vm, value = ctypes.c_uint64(), ctypes.c_uint64()
        assert API.vm_create(made(Config, design=design, memory_size=1 << 20, quirks=quirks), vm) == OK, error()
        strict = quirks or design == C["SC_KVM_2007"]
        for reg, bits, kept in (("SC_CR3", 0x1FFF, 0x1FFF), ("SC_CR0", 0x1FFAFFC1, 0x11)):
            assert API.register_load(vm, 0, C[reg], bits) == (GP if strict else OK)
            assert API.register_read(vm, 0, C[reg], value) == OK
            assert value.value == kept or strict
        assert API.register_load(vm, 0, C["SC_CR3"], 0xF_0000_1000) == OK
        assert API.register_read(vm, 0, C["SC_CR3"], value) == OK
        assert value.value == 0x1000
        assert API.vm_destroy(vm) == OK


def test_save_and_load(guest, tmp_path):
    path = str(tmp_path / "vm.npz").encode()
    for i in range(50):
        guest.access(C["SC_WRITE"], DATA + 4096 * i, value=i)
    assert API.save(guest.vm, path) == OK, error()
    ram = sc.embed.allocate(8 << 20)
    ram[:] = 0xFF
    again = ctypes.c_uint64()
    assert API.vm_load(path, ram.ctypes.data, ram.size, again) == OK, error()
    assert (ram == guest.memory).all()
    out = made(Outcome)
    assert API.access(again, made(Access, gva=DATA + 4096 * 7, size=8, flags=1), out) == OK
    assert (out.value[0], out.exits) == (7, 0)
    assert API.vm_destroy(again) == OK
    assert API.vm_load(path, ram.ctypes.data, 4 << 20, again) == C["SC_E_FILE"], error()
    assert API.vm_load(path, ram.ctypes.data + 8, ram.size - 4096, again) == C["SC_E_ALIGNMENT"]
    assert API.vm_load(str(tmp_path / "none").encode(), None, 0, again) == C["SC_E_FILE"]
    assert API.save(guest.vm, str(tmp_path / "no" / "such").encode()) == C["SC_E_FILE"]
    assert API.save(guest.vm, b"\xff\xfe") == C["SC_E_ARGUMENT"]
    assert again.value == 0
    # Neither failure leaves the VM locked.
    assert guest.access(C["SC_READ"], DATA)[0] == OK


def test_events(guest):
    seen = []

    @EVENT
    def on_event(context, event):
        e = event.contents
        seen.append((e.kind, e.detail, e.vcpu, e.address))
        assert (context, e.vm) == (0x1234, guest.vm.value)

    assert API.on_event(guest.vm, 0xF, on_event, 0x1234) == OK
    guest.access(C["SC_READ"], DATA)
    assert seen[-1] == (C["SC_EVENT_EXIT"], C["SC_EXIT_FILL"], 0, DATA)
    n = len(seen)
    guest.access(C["SC_READ"], DATA)
    assert len(seen) == n
    assert API.register_load(guest.vm, 0, C["SC_CR3"], guest.tables.cr3) == OK
    assert (C["SC_EVENT_EXIT"], C["SC_EXIT_CR3"], 0, guest.tables.cr3) in seen
    assert API.on_event(guest.vm, 0xF, EVENT(0), None) == OK
    n = len(seen)
    guest.access(C["SC_READ"], DATA + 4096)
    assert len(seen) == n
    assert API.on_event(guest.vm, 16, on_event, None) == C["SC_E_ARGUMENT"]


def test_a_callback_may_not_use_its_vm(guest):
    found = []
    other = Guest()

    @EVENT
    def on_event(_context, _event):
        value = ctypes.c_uint64()
        found.append(guest.access(C["SC_READ"], DATA)[0])
        found.append(error())
        found.append(API.vm_destroy(guest.vm))
        found.append(API.save(guest.vm, b"/nonexistent"))
        found.append(API.on_event(guest.vm, 0, EVENT(0), None))
        found.append(API.register_read(guest.vm, 0, 0, value))
        found.append(API.access_many(guest.vm, made(Accesses, all_size=8)))
        found.append(other.access(C["SC_READ"], DATA)[0])

    assert API.on_event(guest.vm, 1, on_event, None) == OK
    assert guest.access(C["SC_READ"], DATA)[0] == OK
    busy = C["SC_E_BUSY"]
    assert [found[0], *found[2:]] == [busy, busy, busy, busy, busy, busy, OK]
    assert "callback" in found[1]
    assert API.on_event(guest.vm, 0, EVENT(0), None) == OK
    other.close()


def test_null_pointers(guest):
    null, vm = C["SC_E_NULL"], guest.vm
    number = ctypes.c_uint64()
    assert API.vm_create(None, number) == null
    assert API.vm_create(guest.config, None) == null
    assert API.vm_create(made(Config, memory_size=4096, n_slots=1), number) == null
    assert API.register_read(vm, 0, 0, None) == null
    assert API.access(vm, None, made(Outcome)) == null
    assert API.access(vm, made(Access, size=8), None) == null
    assert API.translate(vm, None, None) == null
    assert API.access_many(vm, None) == null
    assert API.access_many(vm, made(Accesses, count=1, all_size=8)) == null
    assert API.store(vm, 0, None, 8) == null
    assert API.host_address(vm, 0, None) == null
    assert API.counters(vm, None) == null
    assert API.audit(vm, None) == null
    assert API.save(vm, None) == null
    assert API.vm_load(None, None, 0, number) == null
    assert API.vm_load(b"x", None, 0, None) == null
    assert error()
    # Nothing to store needs no pointer, and a callback is there or not.
    assert API.store(vm, 0, None, 0) == OK
    assert API.on_event(vm, 1, EVENT(0), None) == OK
    guest.same()


@pytest.mark.parametrize("size", [0, 1, -1, 1 << 31])
def test_wrong_sizes_of_structures(guest, size):
    def wrong(cls, **fields):
        new = made(cls, **fields)
        new.struct_size = new.struct_size - 1 if size < 0 else size
        return new

    bad, vm, number = C["SC_E_STRUCT"], guest.vm, ctypes.c_uint64(5)
    assert API.vm_create(wrong(Config, memory_size=4096), number) == bad
    assert number.value == 0
    assert API.access(vm, wrong(Access, size=8), made(Outcome)) == bad
    assert API.access(vm, made(Access, size=8), wrong(Outcome)) == bad
    assert "sc_outcome" in error()
    assert API.translate(vm, made(Access, size=8), wrong(Outcome)) == bad
    assert API.access_many(vm, wrong(Accesses)) == bad
    assert API.counters(vm, wrong(Counters)) == bad
    assert API.audit(vm, wrong(AuditResult)) == bad
    guest.same()


def test_values_that_cannot_be(guest):
    bad, vm, number = C["SC_E_ARGUMENT"], guest.vm, ctypes.c_uint64()
    for fields in (
        {"kind": 3},
        {"kind": 16},
        {"kind": 255},
        {"size": 0},
        {"size": 3},
        {"size": 32},
        {"size": 16, "kind": C["SC_ADD"]},
        {"flags": 4},
        {"reserved": 1},
        {"vcpu": 1},
        {"vcpu": 2**32 - 1},
    ):
        assert API.access(vm, made(Access, **{"size": 8, **fields}), made(Outcome)) == bad, fields
        assert API.translate(vm, made(Access, **{"size": 8, **fields}), made(Outcome)) == bad, fields
    gva = np.array([DATA] * 3, dtype=np.uint64)
    kind = np.array([0, 1, 10], dtype=np.uint8)
    many = made(Accesses, count=3, gva=gva.ctypes.data, kind=kind.ctypes.data, all_size=8)
    assert API.access_many(vm, many) == bad
    assert many.done == 2
    for fields in ({"all_size": 16}, {"all_kind": 3}, {"flags": 2}, {"reserved": 1}, {"vcpu": 9}, {"count": 1 << 60}):
        fields = {"all_size": 8, "count": 3, "gva": gva.ctypes.data, **fields}
        assert API.access_many(vm, made(Accesses, **fields)) == bad, fields
    for gpa, size in ((8 << 20, 1), ((8 << 20) - 1, 2), (2**64 - 1, 8), (0, 2**64 - 1), (2**52 - 1, 4)):
        assert API.stored(vm, gpa, size) == bad
        assert API.store(vm, gpa, b"12345678", size) == bad
    for fields in (
        {"design": 4},
        {"memory_size": 4095},
        {"memory_size": 0},
        {"memory_size": 2**63},
        {"vcpus": 65},
        {"pool_pages": 1},
        {"quirks": 1 << 20},
        {"features": 1 << 20},
        {"maxphyaddr": 60},
        {"reserved": 1},
        {"refill": 1},
    ):
        fields = {"design": C["SC_CACHED"], "memory_size": 4096, **fields}
        assert API.vm_create(made(Config, **fields), number) == bad, fields
        assert error()
        assert number.value == 0
    memory = sc.embed.allocate(8192)
    for at in (1, 8, 2048):
        config = made(Config, memory=memory.ctypes.data + at, memory_size=4096)
        assert API.vm_create(config, number) == C["SC_E_ALIGNMENT"]
    assert guest.access(C["SC_READ"], DATA)[0] == OK


def test_handles_that_are_none():
    guest = Guest()
    old = guest.vm.value
    guest.close()
    bad, number = C["SC_E_HANDLE"], ctypes.c_uint64()
    for vm in (0, 1, old, old + 1, old | 0xFFFF, old + (1 << 16), 2**64 - 1, 1 << 16):
        assert API.access(vm, made(Access, size=8), made(Outcome)) == bad, hex(vm)
        assert API.translate(vm, made(Access, size=8), made(Outcome)) == bad
        assert API.access_many(vm, made(Accesses, all_size=8)) == bad
        assert API.register_read(vm, 0, 0, number) == bad
        assert API.register_load(vm, 0, 0, 0) == bad
        assert API.invlpg(vm, 0, 0) == bad
        assert API.store(vm, 0, b"", 0) == bad
        assert API.stored(vm, 0, 0) == bad
        assert API.host_address(vm, 0, ctypes.c_void_p()) == bad
        assert API.counters(vm, made(Counters)) == bad
        assert API.on_event(vm, 0, EVENT(0), None) == bad
        assert API.audit(vm, made(AuditResult)) == bad
        assert API.save(vm, b"x") == bad
        assert API.vm_destroy(vm) == bad
    assert "handle" in error()
    # The next VM may get the same place, never the same number.
    numbers = set()
    for _ in range(50):
        again = Guest(start=False, size=1 << 22)
        numbers.add(again.vm.value)
        again.close()
    assert len(numbers) == 50
    assert old not in numbers


def test_the_places_run_out():
    vm = sc.VM("64KiB", "native")
    taken = []
    with pytest.raises(MemoryError):
        taken.extend(sc.embed.handle(vm) for _ in range(5000))
    assert len(taken) >= 4000
    for number in taken:
        sc.embed.release(number)
    sc.embed.release(sc.embed.handle(vm))


def test_tables_written_by_way_of_python():
    """Refused while they can be written and while they are not sound; checked by the first call after that."""
    vm = sc.VM("1MiB")
    number = ctypes.c_uint64()
    assert API.vm_adopt(vm, number) == OK

    def access():
        return API.access(number, made(Access, gva=0x1000, kind=1, size=8), made(Outcome))

    assert access() == OK
    held = vm.mmu.writable_arrays()["hash"]
    assert access() == C["SC_E_BUSY"]
    del held
    assert access() == OK
    kept = vm.mmu.arrays["hash"].copy()
    vm.mmu.writable_arrays()["hash"][:] = 77
    assert access() == C["SC_E_BUSY"]
    assert "written by hand" in error()
    vm.mmu.writable_arrays()["hash"][:] = kept
    assert access() == OK
    assert API.vm_destroy(number) == OK


def test_a_vm_of_python():
    """A VM made there has a handle here; it lives on when that is given back."""
    vm = sc.VM("1MiB")
    number = ctypes.c_uint64()
    assert API.vm_adopt(vm, number) == OK
    out = made(Outcome)
    assert API.access(number, made(Access, gva=0x1000, kind=1, size=8, flags=1), out) == OK
    assert vm.stats.accesses == 1
    busy = []

    @EVENT
    def on_event(_context, _event):
        try:
            vm.vcpus[0].read(0)
        except sc.EngineError as found:
            busy.append(str(found))

    assert API.on_event(number, 1, on_event, None) == OK
    assert API.access(number, made(Access, gva=0x5000, size=8), out) == OK
    assert busy
    assert API.vm_destroy(number) == OK
    assert vm.vcpus[0].read(0x7000) == 0  # and nobody is called any more
    assert len(busy) == 1
    assert API.vm_adopt("no VM", number) == C["SC_E_ARGUMENT"]
    with pytest.raises(sc.ConfigError):
        sc.embed.release(number.value)
    with pytest.raises(sc.ConfigError):
        sc.embed.from_handle(12345)
    with pytest.raises(sc.ConfigError):
        sc.embed.handle("no VM")


def test_what_a_python_callback_raises():
    """can_emulate and on_event of an adopted VM: an error code here, the exception there."""
    vm = sc.VM("1MiB")
    number = sc.embed.handle(vm)

    def fail(event):
        raise LookupError("no")

    sc.embed.on_event(vm, fail)
    assert API.access(number, made(Access, gva=0x1000, size=8), made(Outcome)) == C["SC_E_CALLBACK"]
    with pytest.raises(LookupError):
        vm.vcpus[0].read(0x1000)
    assert API.access(number, made(Access, gva=0x1000, size=8), made(Outcome)) == OK
    sc.embed.release(number)


def test_an_exhausted_pool():
    guest = Guest(pool_pages=4, vcpus=4, start=False)
    for vcpu in range(4):
        for name, value in guest.tables.registers.items():
            value += 4096 * 64 * vcpu if name == "cr3" else 0
            API.register_load(guest.vm, vcpu, C[f"SC_{name.upper()}"], value)
    results = [guest.access(C["SC_READ"], DATA, vcpu=i)[0] for i in range(4)]
    assert C["SC_E_POOL"] in results
    assert "pool" in error()
    assert guest.audit().violations == 0
    guest.close()


def test_one_vm_one_thread_and_different_vms_side_by_side():
    """Threads hammer one VM: each call is made whole, or refused. Others do their own work meanwhile, all of it."""
    shared, own = Guest(), [Guest() for _ in range(2)]
    refused, made_, errors = [0], [0], []

    def hammer():
        for i in range(3000):
            rc, _ = shared.access(C["SC_READ"], DATA + 4096 * (i % 256))
            if rc == C["SC_E_BUSY"]:
                refused[0] += 1
            elif rc == OK:
                made_[0] += 1
            else:
                errors.append(rc)

    def alone(guest):
        gva = (DATA + np.arange(100_000, dtype=np.uint64) * 8 % (256 << 12)).astype(np.uint64)
        for _ in range(10):
            rc = API.access_many(guest.vm, made(Accesses, count=len(gva), gva=gva.ctypes.data, all_size=8))
            if rc != OK:
                errors.append(rc)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    threads += [threading.Thread(target=alone, args=(guest,)) for guest in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    counters = made(Counters)
    assert API.counters(shared.vm, counters) == OK
    assert 256 <= counters.accesses <= 9000
    assert shared.audit().violations == 0
    for guest in own:
        assert API.counters(guest.vm, counters) == OK
        assert counters.accesses == 1_000_000
        guest.close()
    shared.close()


def test_other_vms_are_not_waited_for():
    """In the middle of an access of one VM, whose callback waits, another thread uses a second VM."""
    first, second = Guest(), Guest()
    inside, go = threading.Event(), threading.Event()

    @EVENT
    def wait(_context, _event):
        inside.set()
        assert go.wait(60)

    assert API.on_event(first.vm, 1, wait, None) == OK
    thread = threading.Thread(target=first.access, args=(C["SC_READ"], DATA))
    thread.start()
    assert inside.wait(60)
    assert second.access(C["SC_READ"], DATA)[0] == OK
    assert first.access(C["SC_READ"], DATA)[0] == C["SC_E_BUSY"]
    third = Guest()
    third.close()
    go.set()
    thread.join()
    assert API.on_event(first.vm, 0, EVENT(0), None) == OK
    assert first.access(C["SC_READ"], DATA)[0] == OK
    first.close()
    second.close()


PLUGIN = """
#include <shadowcore.h>
#ifdef Py_PYTHON_H
#error Python.h is not needed
#endif
#include <stddef.h>
#include <stdio.h>
#ifdef __cplusplus
extern "C"
#endif
int plugin(const sc_api *api, sc_vm vm, uint64_t gva);
int plugin(const sc_api *api, sc_vm vm, uint64_t gva) {
    sc_access access;
    sc_outcome outcome;
    if (!sc_api_fits(api))
        return -100;
    SC_INIT(&access);
    SC_INIT(&outcome);
    access.gva = gva;
    access.kind = SC_WRITE;
    access.size = 8;
    return api->access(vm, &access, &outcome);
}
"""
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


@pytest.mark.parametrize(("language", "standard", "compiler"), [("c", "c11", "cc"), ("c++", "c++17", "c++")])
def test_a_plugin_without_python(tmp_path, guest, language, standard, compiler):
    """It is handed the table. Its layout of each structure is the one that these tests use."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    source = tmp_path / "plugin.src"
    sizes = "".join(
        f'    {{ {name} *s = NULL; (void)s; printf("{name} %zu", sizeof({name}));'
        + "".join(f' printf(" {f} %zu", offsetof({name}, {f}));' for f, _ in structure(name)._fields_)
        + ' puts(""); }\n'
        for name in STRUCTS
    )
    source.write_text(PLUGIN + "int main(void) {\n" + sizes + "    return 0;\n}\n")
    flags = [compiler, f"-std={standard}", *WARNINGS, "-x", language, source, "-I", sc.get_include()]
    library, program = tmp_path / "plugin.so", tmp_path / "sizes"
    subprocess.run([*flags, "-shared", "-fPIC", "-o", library], check=True)
    subprocess.run([*flags, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = []
    for name in STRUCTS:
        of = structure(name)
        fields = " ".join(f"{field} {getattr(of, field).offset}" for field, _ in of._fields_)
        wanted.append(f"{name} {ctypes.sizeof(of)} {fields}")
    assert printed == wanted
    plugin = ctypes.CDLL(str(library)).plugin
    plugin.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    assert plugin(sc.embed.table_address(), guest.vm, DATA) == OK
    assert plugin(sc.embed.table_address(), guest.vm, 0) == PF
    assert plugin(None, guest.vm, DATA) == -100
    old = (ctypes.c_uint32 * 2)(1, 64)
    assert plugin(ctypes.addressof(old), guest.vm, DATA) == -100


# -- cycles ----------------------------------------------------------------------------------------------


def priced(guest, preset=b"modern"):
    prices = made(Prices)
    assert API.prices(preset, prices) == 0, error()
    assert API.set_prices(guest.vm, prices) == 0
    return prices


def spent(guest):
    cycles = ctypes.c_double()
    assert API.cycles(guest.vm, cycles) == 0
    return cycles.value


def virtualization(costs, stats):
    """What sc.Costs makes of the counters, but for the guest's own instructions."""
    components = getattr(sc.Costs, costs)().of(stats.as_dict()).components
    return sum(cycles for name, cycles in components.items() if name not in ("work", "guest"))


@pytest.mark.parametrize("preset", ["core2007", "modern", "pvm", "nested"])
@pytest.mark.parametrize("tlb", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_cycles_are_those_of_costs(design, tlb, preset):
    """The sum of what accesses cost is the cost of what they counted; with and without prices the same is counted."""
    three = ctypes.c_uint32 * 3
    config = {"tlb_entries": three(64, 32, 4), "tlb_ways": three(4, 4, 4)} if tlb else {}
    guest, free = (Guest(design, **config) for _ in range(2))
    priced(guest, preset.encode())
    began, total = spent(guest), 0
    random = np.random.default_rng(5)
    for i in range(300):
        if i % 50 == 49:
            value = ctypes.c_uint64()
            assert API.register_read(guest.vm, 0, C["SC_CR3"], value) == 0
            before = spent(guest)
            for machine in (guest, free):
                assert API.register_load(machine.vm, 0, C["SC_CR3"], value) == 0
            began += spent(guest) - before
            assert (spent(guest) > before) == (design != "native")
        page = random.integers(0x400, 0x52C) if i % 3 else random.integers(0x800, 0x830)
        gva = int(page) * 4096
        kind, size = int(random.integers(0, 2)), 8
        rc, outcome = guest.access(kind, gva, size, value=0)
        assert free.access(kind, gva, size, value=0)[0] == rc
        total += outcome.cycles
    assert guest.counters().tolist() == free.counters().tolist()
    assert (guest.memory == free.memory).all()
    assert spent(guest) - began == pytest.approx(total, abs=300 * 0.5)
    stats = sc.embed.from_handle(guest.vm.value).stats
    assert spent(guest) == pytest.approx(virtualization(preset, stats))
    assert API.set_prices(guest.vm, None) == 0
    assert spent(guest) == 0
    assert guest.access(C["SC_READ"], 0x40_0000)[1].cycles == 0
    guest.close()
    free.close()


def test_prices_that_cannot_be():
    guest = Guest()
    prices = made(Prices)
    assert API.prices(b"cheap", prices) == C["SC_E_ARGUMENT"]
    assert "cheap" in error()
    assert API.prices(b"\xff", prices) == C["SC_E_ARGUMENT"]
    assert API.prices(None, prices) == API.prices(b"pvm", None) == API.cycles(guest.vm, None) == C["SC_E_NULL"]
    for value in (-1.0, math.nan, math.inf):
        for name, _ in Prices._fields_[2:]:
            prices = made(Prices, **{name: value})
            assert API.set_prices(guest.vm, prices) == C["SC_E_ARGUMENT"]
    assert API.set_prices(guest.vm, made(Prices, reserved=1)) == C["SC_E_ARGUMENT"]
    prices.struct_size = 8
    assert API.set_prices(guest.vm, prices) == API.prices(b"pvm", prices) == C["SC_E_STRUCT"]
    assert API.set_prices(99 << 16, None) == API.cycles(99 << 16, ctypes.c_double()) == C["SC_E_HANDLE"]
    assert spent(guest) == 0
    prices = made(Prices, dispatch=1e300)
    assert API.set_prices(guest.vm, prices) == 0
    assert guest.access(C["SC_READ"], 0x40_0000)[1].cycles == 2**32 - 1
    guest.close()
    fresh = Guest()  # in the same place
    assert spent(fresh) == 0
    fresh.close()
