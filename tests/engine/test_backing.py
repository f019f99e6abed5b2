"""A host that has not all of the guest's memory, and takes frames of it back, under every design."""

import numpy as np
import pytest
from changing_slots import (
    DESIGNS,
    EXACT,
    HERE,
    LOW,
    LOW_SIZE,
    MIB,
    MODES,
    PAGE,
    RAM,
    SIZE,
    THERE,
    VA_HERE,
    VA_LARGE,
    VA_LOW,
    VA_MIXED,
    Machine,
    same,
)

import shadowcore as sc

EVERY = {"native": "native", **DESIGNS}
TLB = sc.TLB(16, 4, 4, 4, 0, 1)
ABSENT, AWAY, ZERO, OWN = range(4)
NOTHING, TABLE, LARGE, HUGE = 0, 1, 2, 4
every_design = pytest.mark.parametrize("design", EVERY)
GFN = LOW >> 12


def frames(vm):
    return vm.memory.backing_arrays()[0]


def blocks(vm):
    return vm.memory.backing_arrays()[1].tolist()


@pytest.mark.parametrize("tlb", [None, TLB], ids=["walks", "tlb"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", EXACT)
def test_a_random_program_is_what_it_is_natively(design, mode, tlb):
    for seed, backing in enumerate(("warm", "cold", "thp")):
        made, native = same(design, mode, seed, host=True, tlb=tlb, backing=backing)
        assert made.vm.stats.host_unmaps > 0
        if backing != "warm":
            assert native.vm.stats.host_faults > 0


@every_design
def test_warm_memory_keeps_no_account(design):
    vm = sc.VM("1MiB", EVERY[design])
    vm.vcpus[0].write(0, 1)
    vm.host_touch(0, 4)
    assert vm.memory.backing_arrays() == ()
    assert vm.stats.host_faults == 0


@every_design
@pytest.mark.parametrize("mode", MODES)
def test_a_first_touch_is_counted(design, mode):
    """A load finds the zero page, a store then makes a page."""
    m = Machine(EVERY[design], mode)
    m.read(VA_LOW)
    m.vm.host_unmap(GFN, 2, discard=True)
    assert frames(m.vm)[GFN : GFN + 3].tolist() == [ABSENT, ABSENT, OWN]
    for access, state, more in (
        (lambda: m.read(VA_LOW), ZERO, 1),
        (lambda: m.read(VA_LOW), ZERO, 0),
        (lambda: m.write(VA_LOW, 1), OWN, 1),
        (lambda: m.read(VA_LOW), OWN, 0),
        (lambda: m.write(VA_LOW, 2), OWN, 0),
        (lambda: m.device(LOW + PAGE, 1), OWN, 1),
    ):
        before = m.vm.stats.host_faults
        access()
        at = GFN + (access() is None and before < 0)
        assert m.vm.stats.host_faults - before == more
        assert frames(m.vm)[at] == state or more == 1
    assert frames(m.vm)[GFN + 1] == OWN
    assert m.vm.audit().ok


@every_design
@pytest.mark.parametrize("mode", MODES)
def test_frames_that_are_taken_away_come_back(design, mode):
    m = Machine(EVERY[design], mode)
    for i in range(6):
        m.write(VA_LOW + i * PAGE, 7 + i)
    taken = m.vm.stats.pf_taken
    m.vm.host_unmap(GFN, 3)
    assert frames(m.vm)[GFN : GFN + 4].tolist() == [AWAY, AWAY, AWAY, OWN]
    assert m.vm.audit().ok
    assert all(len(m.vm.mmu.rmap(gfn)) == 0 for gfn in range(GFN, GFN + 3)) if design != "native" else True
    assert [m.read(VA_LOW + i * PAGE) for i in range(6)] == [7, 8, 9, 10, 11, 12]
    assert frames(m.vm)[GFN : GFN + 4].tolist() == [OWN] * 4
    if design != "native":
        assert m.vm.stats.pf_taken > taken
    m.vm.host_unmap(GFN, 3, discard=True)
    assert [m.read(VA_LOW + i * PAGE) for i in range(6)] == [0, 0, 0, 10, 11, 12]
    assert m.vm.stats.host_unmaps >= 2
    assert m.vm.audit().ok


@pytest.mark.parametrize("tlb", [None, TLB], ids=["walks", "tlb"])
@every_design
def test_tables_can_be_taken_away(design, tlb):
    m = Machine(EVERY[design], tlb=tlb)
    assert m.read(VA_LOW) == m.read(VA_MIXED) == 0
    leaf, root = m.tables.entry(VA_LOW, 1).gpa >> 12, m.cpu.cr3 >> 12
    for gfn in (leaf, root):
        m.vm.host_unmap(gfn)
        m.cpu.cr3 = m.cpu.cr3
        assert m.read(VA_LOW) == 0
    m.vm.host_unmap(leaf, discard=True)
    m.cpu.cr3 = m.cpu.cr3  # what lags may do so until here
    m.cpu.invlpg(VA_LOW)
    with pytest.raises(sc.PageFault):
        m.read(VA_LOW)
    m.vm.host_unmap(root, discard=True)
    m.cpu.cr3 = m.cpu.cr3
    m.cpu.invlpg(VA_HERE)
    with pytest.raises(sc.PageFault):
        m.read(VA_HERE)
    assert m.vm.audit().ok


@pytest.mark.parametrize("design", ["unsync", "kvm-6.1", "kvm-6.12"])
def test_a_store_to_the_zero_page_takes_two_exits(design):
    m = Machine(EVERY[design])
    m.vm.host_unmap(GFN, discard=True)
    m.read(VA_LOW)
    fixed, taken = m.vm.stats.pf_fixed, m.vm.stats.pf_taken
    m.write(VA_LOW, 1)
    assert (m.vm.stats.pf_taken - taken, m.vm.stats.pf_fixed - fixed) == (2, 1)


@pytest.mark.parametrize("design", ["unsync", "kvm-6.1", "kvm-6.12"])
def test_large_leaves_follow_the_host(design):
    """2 MiB are made at once; a page that goes splits them; put together, they are mapped by a large leaf again."""
    m = Machine(EVERY[design], backing="thp")
    large = VA_LARGE + 2 * MIB
    m.vm.host_unmap(0x200, 512, discard=True)  # of the tables too: they come back as zeros
    m = Machine(EVERY[design])
    m.vm.memory.back()
    assert blocks(m.vm) == [TABLE] * 4
    m.read(large)
    assert m.vm.stats.pages_2m == 0
    m.vm.host_collapse(0x200)
    assert blocks(m.vm) == [TABLE, HUGE | LARGE, TABLE, TABLE]
    m.read(large)
    assert m.vm.stats.pages_2m == 0  # the guest's tables are there
    m.vm.host_collapse(0)
    m.read(VA_LARGE)
    assert m.vm.stats.pages_2m == 1
    m.write(VA_LARGE + MIB, 5)
    m.vm.host_unmap(0x100)
    assert blocks(m.vm)[0] == HUGE | TABLE
    assert m.vm.stats.pages_2m == 0
    assert m.read(VA_LARGE + MIB) == 5
    assert m.vm.stats.pages_2m == 0
    m.vm.host_collapse(0)
    assert m.read(VA_LARGE + MIB) == 5
    assert m.vm.stats.pages_2m == 1
    m.vm.host_unmap(0, 512, discard=True)
    assert blocks(m.vm)[0] == HUGE | NOTHING
    assert m.read(VA_LARGE) == 0
    assert blocks(m.vm)[0] == HUGE | LARGE
    assert frames(m.vm)[:512].tolist() == [ZERO] * 512
    assert m.vm.stats.pages_2m == 1
    m.write(VA_LARGE, 1)
    assert blocks(m.vm)[0] == HUGE | TABLE
    assert m.vm.audit().ok


def test_backing_at_first():
    """By the VM and by slot; what a caller's array holds is not lost; blocks of which others have a part stay small."""
    vm = sc.VM("8MiB", "native", backing="cold")
    assert set(frames(vm).tolist()) == {ABSENT}
    assert blocks(vm) == [NOTHING] * 4
    vm = sc.VM("8MiB", "native", backing="thp")
    assert blocks(vm) == [HUGE | NOTHING] * 4
    vm.vcpus[0].read(0, 1)
    vm.vcpus[0].write(2 * MIB, 1, 1)
    assert blocks(vm) == [HUGE | LARGE] * 2 + [HUGE | NOTHING] * 2
    assert frames(vm)[[0, 511, 512, 1023, 1024]].tolist() == [ZERO, ZERO, OWN, OWN, ABSENT]
    assert vm.stats.host_faults == 2
    ram = np.zeros(4 * MIB + 3 * PAGE, np.uint8)
    ram[5 * PAGE] = 7
    vm = sc.VM(ram, "native", backing="thp")
    assert frames(vm)[[4, 5, 6]].tolist() == [ABSENT, AWAY, ABSENT]
    assert blocks(vm) == [TABLE, HUGE | NOTHING, TABLE]
    assert vm.vcpus[0].read(5 * PAGE, 1) == 7
    assert frames(vm)[5] == OWN
    slots = [sc.MemorySlot(0, 2 * MIB, backing="cold"), sc.MemorySlot(4 * MIB, 2 * MIB, host_page_size="2MiB")]
    slots += [sc.MemorySlot(8 * MIB, 3 * MIB, backing="thp")]
    vm = sc.VM(8 * MIB, "unsync", slots=slots)
    assert blocks(vm) == [NOTHING, HUGE | LARGE, HUGE | NOTHING, TABLE]
    assert [int(frames(vm)[i << 9]) for i in range(4)] == [ABSENT, OWN, ABSENT, ABSENT]
    assert vm.add_slot(16 * MIB, MIB, backing="cold") == 3
    assert set(frames(vm)[0x700:].tolist()) == {ABSENT}


@every_design
def test_a_cold_slot_that_is_added(design):
    m = Machine(EVERY[design])
    m.vm.add_slot(THERE, MIB, backing="cold")
    assert m.read(VA_HERE) == 0
    first = (LOW_SIZE + SIZE) >> 12
    assert set(frames(m.vm)[first : first + 256].tolist()) == {ABSENT}
    assert set(frames(m.vm)[:first].tolist()) == {OWN}
    m.device(THERE, 5)
    assert frames(m.vm)[first] == OWN
    m.vm.remove_slot(2)
    m.vm.add_slot(THERE, MIB, backing="cold")  # what is in it is not lost
    assert frames(m.vm)[first] == AWAY
    assert m.vm.read_physical(THERE, 1) == b"\5"
    assert m.vm.audit().ok


def test_backing_is_saved(tmp_path):
    for design in ("native", "cached", "unsync"):
        m = Machine(EVERY[design], backing="thp")
        m.write(VA_LOW, 1)
        m.vm.host_unmap(GFN + 1, 2)
        m.vm.add_slot(THERE, MIB, read_only=True, slot=5)
        m.vm.set_slot(1, gpa=64 * MIB)
        m.vm.save(tmp_path / "vm")
        loaded = sc.VM.load(tmp_path / "vm")
        for array, other in zip(m.memory.backing_arrays(), loaded.memory.backing_arrays(), strict=True):
            assert np.array_equal(array, other)
        assert [slot and (slot.gpa, slot.size, slot.read_only) for slot in loaded.memory.slots] == [
            slot and (slot.gpa, slot.size, slot.read_only) for slot in m.memory.slots
        ]
        assert loaded.memory.frame(THERE >> 12) == m.memory.frame(THERE >> 12)
        for vm in (m.vm, loaded):
            vm.vcpus[0].write(VA_LOW + PAGE, 3, 8)
            with pytest.raises(sc.MMIOAccess):
                vm.vcpus[0].read(VA_HERE, 8)
            vm.host_unmap(GFN, 8, discard=True)
            vm.vcpus[0].read(VA_LOW, 8)
            vm.remove_slot(5)
            assert vm.audit().ok
        assert m.vm.stats.as_dict() == loaded.stats.as_dict()
        assert np.array_equal(m.memory.bytes, loaded.memory.bytes)


BAD = {
    "beyond": ("gfn, n", lambda vm: vm.host_unmap(0x3FF, 2)),
    "in no slot": ("gfn, n", lambda vm: vm.host_unmap(THERE >> 12)),
    "huge": ("gfn", lambda vm: vm.host_unmap(1 << 60)),
    "huge n": ("n", lambda vm: vm.host_unmap(0, 1 << 60)),
    "very many": ("gfn, n", lambda vm: vm.host_unmap(0, 1 << 51)),
    "n of 0": ("n", lambda vm: vm.host_unmap(0, 0)),
    "negative": ("gfn", lambda vm: vm.host_unmap(-1)),
    "discard": ("discard", lambda vm: vm.host_unmap(0, 1, discard="yes")),
    "touch, in no slot": ("gfn, n", lambda vm: vm.host_touch(THERE >> 12)),
    "touch, write": ("write", lambda vm: vm.host_touch(0, write=None)),
    "collapse, misaligned": ("gfn, n", lambda vm: vm.host_collapse(1)),
    "collapse, a part": ("gfn, n", lambda vm: vm.host_collapse(0, 511)),
    "collapse, a small slot": ("gfn, n", lambda vm: vm.host_collapse(HERE >> 12)),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backing", ["warm", "cold"])
@pytest.mark.parametrize("design", ["native", "cached", "unsync"])
def test_bad_input_changes_nothing(design, backing, bad):
    field, call = BAD[bad]
    m = Machine(EVERY[design], backing=backing)
    m.write(VA_LOW, 5)
    before = [array.tobytes() for array in m.memory.backing_arrays()], m.vm.stats.as_dict(), m.memory.bytes.tobytes()
    with pytest.raises(sc.ConfigError, match=f"^{field}:"):
        call(m.vm)
    after = [array.tobytes() for array in m.memory.backing_arrays()], m.vm.stats.as_dict(), m.memory.bytes.tobytes()
    assert after == before


def test_bad_backing_at_first():
    for backing in ("hot", None, 3, b"cold"):
        with pytest.raises(sc.ConfigError, match=r"^backing:"):
            sc.VM("1MiB", backing=backing)
    with pytest.raises(sc.ConfigError, match=r"^slot\.backing:"):
        sc.MemorySlot(0, MIB, backing="hot")
    vm = sc.VM(RAM, backing="cold")
    good = [array.copy() for array in vm.memory.backing_arrays()]
    for change in (
        lambda f, b: (f[:-1], b),
        lambda f, b: (f, b[:-1]),
        lambda f, b: (np.full_like(f, 16), b),
        lambda f, b: (f, np.full_like(b, 3)),
        lambda f, b: (f, np.full_like(b, 8)),
        lambda f, b: (np.full_like(f, OWN), b),  # no table
        lambda f, b: (f, np.full_like(b, LARGE)),  # of nothing
    ):
        with pytest.raises(sc.ConfigError, match=r"^backing:"):
            vm.memory.import_backing(change(*(array.copy() for array in good)))
        assert all(np.array_equal(a, b) for a, b in zip(good, vm.memory.backing_arrays(), strict=True))
