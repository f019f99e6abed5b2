"""The table of C functions against every misuse, and what its errors leave behind."""

import ctypes

import numpy as np
import pytest
from capi import (
    API,
    DATA,
    EVENT,
    OK,
    Access,
    Accesses,
    AuditResult,
    C,
    Config,
    Counters,
    Guest,
    Outcome,
    error,
    made,
)

import shadowcore as sc


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
        {"flags": 8},
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
        {"design": 12},
        {"prefetch": 3, "design": C["SC_UNSYNC"]},
        {"prev_roots": 17, "design": C["SC_UNSYNC"]},
        {"host_page_size": 8192},
        {"host_page_size": 2**64 - 1},
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
        {"update_in_place": 2},
        {"flood_pages": 2},
        {"flood_pages": 1, "design": C["SC_UNSYNC"]},
        {"flood_pages": 1, "flood_threshold": 256},
        {"flood_forget": 1},
        {"flood_forget": 2**32 - 1, "flood_pages": 1},
        {"update_in_place": 1, "design": C["SC_KVM_2007"]},
        {"reserved_4": 1},
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
