"""Memory slots that change, and a host that takes frames away, by the C functions."""

import ctypes

import numpy as np
import pytest
from capi import API, DATA, MMIO, OK, C, Config, Guest, MemorySlot, NewSlot, error, made

import shadowcore as sc

MIB = 1 << 20


@pytest.fixture
def machine():
    """A VM of 8 MiB of RAM, of which one slot has the lower half; and its Python object."""
    memory = sc.embed.allocate(8 * MIB)
    slots = (MemorySlot * 1)(MemorySlot(0, 4 * MIB))
    pointer = ctypes.cast(slots, ctypes.c_void_p).value
    config = made(Config, design=4, memory=memory.ctypes.data, memory_size=8 * MIB, slots=pointer, n_slots=1)
    vm = ctypes.c_uint64()
    assert API.vm_create(config, vm) == OK, error()
    yield vm, sc._capi.table.from_handle(vm.value), memory
    API.vm_destroy(vm)


def add(vm, **fields):
    fields = {"number": C["SC_ANY"], "gpa": 16 * MIB, "size": MIB, "offset": 2**64 - 1} | fields
    number = ctypes.c_uint32(77)
    return API.slot_add(vm, made(NewSlot, **fields), number), number.value


def test_a_slot_comes_moves_and_goes(machine):
    vm, twin, memory = machine
    memory[4 * MIB : 5 * MIB] = 9
    assert add(vm) == (OK, 1)
    assert twin.memory.slots[1] == sc.MemorySlot(16 * MIB, MIB, offset=4 * MIB)
    assert twin.read_physical(16 * MIB, 2) == b"\x09\x09"
    assert API.slot_move(vm, 1, 32 * MIB) == OK
    assert twin.memory.slots[1].gpa == 32 * MIB
    assert add(vm, number=5, gpa=64 * MIB, offset=7 * MIB, dirty_log=1, read_only=0) == (OK, 5)
    assert twin.memory.logged_slots == (5,) or 5 in twin.memory.logged_slots
    assert API.slot_remove(vm, 1) == OK
    assert twin.memory.slots[1] is None
    assert API.store(vm, 32 * MIB, b"x", 1) == C["SC_E_ARGUMENT"]
    assert API.store(vm, 64 * MIB, b"x", 1) == OK
    assert memory[7 * MIB] == ord("x")


def test_a_device_does_not_store_to_what_is_read_only(machine):
    """Nothing of it, where one byte lies there; who has stored through a host pointer may say so."""
    vm, twin, memory = machine
    assert add(vm, gpa=4 * MIB, read_only=1) == (OK, 1)
    before = memory.copy()
    assert API.store(vm, 4 * MIB, b"12345678", 8) == C["SC_E_ARGUMENT"]
    assert "may be written" in error()
    assert API.store(vm, 4 * MIB - 4, b"12345678", 8) == C["SC_E_ARGUMENT"]
    assert (memory == before).all()
    with pytest.raises(sc.ConfigError, match="may be written"):
        twin.write_physical(4 * MIB, b"12345678")
    assert API.stored(vm, 4 * MIB, 8) == OK
    assert API.store(vm, 4 * MIB - 8, b"12345678", 8) == OK


def test_the_host_takes_frames_away():
    guest = Guest("unsync")
    other = Guest("unsync")
    for each in (guest, other):
        for page in range(8):
            each.access(C["SC_WRITE"], DATA + 4096 * page, value=page)
    frame = int(guest.twin.vcpus[0].translate(DATA).gpa) >> 12
    leaves = guest.counters()
    assert API.host_unmap(guest.vm, frame, 4, 0) == OK, error()
    assert (guest.counters() != leaves).any()
    assert guest.access(C["SC_READ"], DATA)[1].exits == 1
    assert other.access(C["SC_READ"], DATA)[1].exits == 0
    assert guest.access(C["SC_READ"], DATA + 4096)[1].value[0] == 1
    assert API.host_unmap(guest.vm, frame, 1, 1) == OK
    assert guest.access(C["SC_READ"], DATA)[1].value[0] == 0
    assert API.host_touch(guest.vm, frame, 4, 1) == OK
    assert API.host_collapse(guest.vm, frame & ~511, 512) == OK, error()
    assert guest.audit().violations == 0
    guest.close()
    other.close()


def test_what_cannot_be(machine):
    """Nothing has changed, the error says why, and the VM is free for the next call."""
    vm, twin, _ = machine
    slots, bad = twin.memory.slots, C["SC_E_ARGUMENT"]
    wrong = [
        {"gpa": 0},
        {"size": 0},
        {"size": 5 * MIB},
        {"size": 4097},
        {"number": 0},
        {"number": 32},
        {"offset": 0},
        {"offset": 5},
        {"host_page_size": 12345},
        {"backing": 4},
        {"dirty_log": 2},
        {"read_only": 7},
        {"reserved": (0, 0, 0, 0, 1)},
    ]
    for fields in wrong:
        assert add(vm, **fields) == (bad, 77), fields
        assert error()
    assert API.slot_add(vm, None, ctypes.c_uint32()) == C["SC_E_NULL"]
    assert API.slot_add(vm, made(NewSlot), None) == C["SC_E_NULL"]
    short = made(NewSlot, gpa=16 * MIB, size=MIB)
    short.struct_size -= 1
    assert API.slot_add(vm, short, ctypes.c_uint32()) == C["SC_E_STRUCT"]
    assert API.slot_remove(vm, 3) == API.slot_remove(vm, 2**32 - 1) == bad
    assert API.slot_move(vm, 0, 5) == API.slot_move(vm, 7, 0) == API.slot_move(vm, 0, 2**64 - 4096) == bad
    for call in (API.host_unmap, API.host_touch):
        assert call(vm, 1024, 1, 0) == call(vm, 0, 2**64 - 1, 0) == call(vm, 2**64 - 1, 1, 0) == bad
    assert API.host_collapse(vm, 3, 512) == API.host_collapse(vm, 1024, 512) == bad
    assert twin.memory.slots == slots
    for handle in (0, vm.value + 1):
        assert add(handle)[0] == API.slot_remove(handle, 0) == API.slot_move(handle, 0, 0) == C["SC_E_HANDLE"]
        assert API.host_unmap(handle, 0, 1, 0) == API.host_touch(handle, 0, 1, 0) == C["SC_E_HANDLE"]
        assert API.host_collapse(handle, 0, 512) == C["SC_E_HANDLE"]
    assert add(vm) == (OK, 1)
    assert C["SC_MMIO"] == MMIO
    assert np.all(twin.memory.bytes[4 * MIB :] == 0)
