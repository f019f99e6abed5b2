"""The table of C functions: against the same VM driven from Python."""

import ctypes
import itertools
import re

import numpy as np
import pytest
from capi import (
    API,
    DATA,
    DESIGNS,
    GP,
    MMIO,
    OK,
    PF,
    PROTOTYPES,
    TABLES,
    TEXT,
    Access,
    Accesses,
    C,
    Config,
    Counters,
    Guest,
    MemorySlot,
    Outcome,
    error,
    made,
)

import shadowcore as sc
from shadowcore.engine.counters import COUNTERS, EXIT_REASONS


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
    count = 1500
    ops = np.zeros(count, dtype=[*((n, sc.OP_DTYPE.fields[n][0]) for n in sc.OP_DTYPE.names), ("expected", "<u8")])
    ops["op"], ops["size"], ops["user"] = (rng.choice(of, count) for of in (codes, [1, 2, 4, 8], [0, 1]))
    base = rng.choice([DATA, DATA, DATA, TABLES, 0, 0x8000_0000_0000, DATA + (256 << 12) - 4], count)
    ops["addr"] = base + np.where(np.isin(base, (DATA, TABLES)), rng.integers(0, 20 << 12, count), 0)
    # What stores put into tables keeps to bits that make entries: a new table, or none.
    ops["value"] = np.where(base == DATA, rng.integers(0, 1 << 62, count), 0)
    if not data:
        ops["value"][ops["op"] == C["SC_WRITE"]] = 0
    for i, op in enumerate(ops):
        result = guest.cpu.run(ops[i : i + 1], data=data)
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
    names = ("gbpages", "la57", "pse36", "smep", "smap", "pku", "pcid", "umip", "fsgsbase", "xsave", "invpcid")
    assert found.features == sc.Features(maxphyaddr=36, **dict.fromkeys(names, False))
    del found
    assert API.vm_destroy(vm) == OK


def test_settings_of_unsync():
    """Those that were appended to sc_config, and a caller that does not know them."""
    none = C["SC_SETTING_ZERO"]
    vm = ctypes.c_uint64()
    for number, name in enumerate(DESIGNS):
        assert C["SC_" + re.sub(r"\W", "_", name).upper()] == number
    config = made(Config, design=C["SC_KVM_6_12"], memory_size=8 << 20, prev_roots=none, prefetch=16)
    config.host_page_size = 2 << 20
    assert API.vm_create(config, vm) == OK, error()
    found = sc.embed.from_handle(vm.value)
    assert (found.mmu.design.prev_roots, found.mmu.design.prefetch, found.mmu.design.release) == (0, 16, "6.12")
    assert found.memory.slots == (sc.MemorySlot(0, 8 << 20, host_page_size=2 << 20),)
    del found
    assert API.vm_destroy(vm) == OK
    config = made(Config, design=C["SC_UNSYNC"], memory_size=8 << 20)
    config.struct_size, config.prefetch, config.host_page_size = Config.prev_roots.offset, 3, 3  # beyond its end
    assert API.vm_create(config, vm) == OK, error()
    assert sc.embed.from_handle(vm.value).mmu.design == sc.Shadow.unsync(pool_pages=64)
    assert API.vm_destroy(vm) == OK


def test_settings_of_stores_to_tables():
    """Those that were appended to sc_config, and a caller that does not know them."""
    vm = ctypes.c_uint64()
    asked = {"update_in_place": 1, "flood_pages": 1, "flood_forget": 5, "prefetch": 4}
    assert API.vm_create(made(Config, design=C["SC_CACHED"], memory_size=1 << 20, **asked), vm) == OK, error()
    wanted = sc.Shadow.cached(update_in_place=True, flood_pages=True, flood_forget=5, prefetch=4)
    assert sc.embed.from_handle(vm.value).mmu.design == wanted
    assert API.vm_destroy(vm) == OK
    config = made(Config, design=C["SC_KVM_6_1"], memory_size=8 << 20, update_in_place=1, flood_forget=2)
    assert API.vm_create(config, vm) == OK, error()
    wanted = sc.config.design("kvm-6.1", update_in_place=True, flood_forget=2, pool_pages=64)
    assert sc.embed.from_handle(vm.value).mmu.design == wanted
    assert API.vm_destroy(vm) == OK
    config = made(Config, design=C["SC_CACHED"], memory_size=1 << 20, policy=1, update_in_place=7, reserved_4=7)
    config.struct_size = Config.update_in_place.offset
    assert API.vm_create(config, vm) == OK, error()
    assert sc.embed.from_handle(vm.value).mmu.design == sc.Shadow.cached(policy="lru")
    assert API.vm_destroy(vm) == OK


@pytest.mark.parametrize(
    ("name", "design"),
    [
        ("prev_roots", "cached"),
        ("prefetch", "flush"),
        ("prefetch", "native"),
        ("update_in_place", "flush"),
        ("flood_pages", "native"),
        ("flood_forget", "nested"),
    ],
)
def test_settings_that_a_design_has_not(name, design):
    vm = ctypes.c_uint64()
    config = made(Config, design=C[f"SC_{design.upper()}"], memory_size=1 << 20, **{name: 1})
    assert API.vm_create(config, vm) == C["SC_E_ARGUMENT"]
    assert error() == f"ConfigError: {name}: the design '{design}' has no such setting"


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
