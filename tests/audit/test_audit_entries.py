"""What breaks several entries at once, or is a matter of degree, and what `flush` and `native` are free of."""

import numpy as np
import pytest
from broken import (
    ALIAS,
    CHILD,
    HEAD,
    LARGE,
    LEAF,
    LEVEL,
    LIST,
    MANY,
    NONGLOBAL,
    READ_ONLY,
    RIGHTS,
    ROOT,
    SPTES,
    SUM,
    UNUSED,
    UNWRITTEN,
    behind,
    found,
    free_page,
    gfn_of,
    machine,
    place,
)
from guest2007 import MODES, PAGE, RAM, USER, D, Guest, P, U, W, every_mode

import shadowcore as sc
from shadowcore.engine.counters import COUNTERS, EXIT_REASONS
from shadowcore.pagetables import NX, PS


@pytest.mark.parametrize("mode", MODES)
def test_leaf_beyond_ram(mode):
    """The reverse map is of frames: what a leaf maps that is not writable is checked beside it."""
    guest = machine(mode)
    page, index = place(guest, READ_ONLY)
    guest.vm.mmu.writable_arrays()["table"][page, index] += np.uint64(RAM)
    assert ("I3", LEAF, page, index, gfn_of(guest, page)) in found(guest.vm)
    with pytest.raises(sc.AuditError):
        guest.cpu.read(READ_ONLY)


@pytest.mark.parametrize("mode", MODES)
def test_head_of_one_says_many(mode):
    """Removing the one would take the neighbour that it has not as the first."""
    guest = machine(mode)
    child, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["parents"][child] |= np.uint32(MANY)
    assert ("I4", HEAD, child, 0, gfn_of(guest, child)) in found(guest.vm)


@pytest.mark.parametrize("level", [0, 6, 15])
@pytest.mark.parametrize("mode", MODES)
def test_level_that_there_is_not(mode, level):
    guest = machine(mode)
    page, _ = place(guest, USER)
    role = guest.vm.mmu.writable_arrays()["pages"]["role"]
    role[page] = role[page] & ~np.uint32(0xF0) | np.uint32(level << 4)
    del role
    assert ("I6", LEVEL, page, 0, gfn_of(guest, page)) in found(guest.vm)


@pytest.mark.parametrize("field", [0, 4, 10])
@pytest.mark.parametrize("mode", MODES)
def test_root_of_another_format(mode, field):
    """Levels of the guest, level of the page, direct."""
    guest = machine(mode)
    slot, root = next((slot, root) for slot, root in enumerate(guest.vm.mmu.roots()) if root is not None)
    guest.vm.mmu.writable_arrays()["pages"]["role"][root] ^= np.uint32(1 << field)
    assert ("I7", ROOT, root, slot, gfn_of(guest, root)) in found(guest.vm)


# -- I1 where a guest's rights are those of several entries ------------------------------------------------------


def reported_at(guest, invariant, *places):
    """The audit finds something, all of it about `invariant` and at some of the places."""
    violations = found(guest.vm)
    return bool(violations) and {(v[0], v[2], v[3]) for v in violations} <= {(invariant, *at) for at in places}


BITS = {"W": W, "U": U, "NX": NX}
UPPER = [
    (mode, level, bit)
    for mode, top in (("32", 2), ("pae", 2), ("64", 4), ("la57", 5))
    for level in range(2, top + 1)
    for bit in BITS
    if (mode, bit) != ("32", "NX")
]


@pytest.mark.parametrize(("mode", "level", "bit"), UPPER)
def test_rights_withdrawn_in_an_upper_table(mode, level, bit):
    """The guest's rights are the AND over its tables; here an upper entry takes one away behind the MMU's back."""
    guest = machine(mode)
    behind(guest, guest.entry(USER, level), lambda entry: entry ^ BITS[bit])
    entries = {(page, index) for at, page, index, _ in guest.path(USER) if at <= level}
    if level > 2:  # what hangs below that entry besides
        entries |= {place(guest, va) for va in (USER, ALIAS, READ_ONLY, UNWRITTEN, LARGE)}
        entries |= {place(guest, va, at) for va in (ALIAS, LARGE) for at in range(2, level + 1)}
    assert reported_at(guest, "I1", *entries)


LARGE_CHANGES = [
    (mode, change) for mode in MODES for change in ("frame", "W", "U", "D", "NX", "P") if (mode, change) != ("32", "NX")
]


@pytest.mark.parametrize(("mode", "change"), LARGE_CHANGES)
def test_entry_of_a_large_page_changed(mode, change):
    """The leaves of a large page are compared with the one entry that maps it."""
    guest = machine(mode)
    bits = {**BITS, "P": P, "D": D, "frame": 1 << guest.tables.format.shift(2)}[change]
    behind(guest, guest.entry(LARGE, 2), lambda entry: entry ^ bits)
    assert reported_at(guest, "I1", place(guest, LARGE), place(guest, LARGE, 2))


@every_mode
def test_table_entry_becomes_a_large_page(mode):
    """PS set in an entry whose table has a shadow: the guest has other memory there now, or a reserved bit."""
    guest = machine(mode)
    behind(guest, guest.entry(USER, 2), lambda entry: entry | PS)
    assert reported_at(guest, "I1", place(guest, USER, 2))


def test_ps_means_nothing_in_a_directory_without_pse():
    """CR4.PSE = 0: bit 7 of a 4-byte directory entry is ignored, so that nothing is wrong."""
    guest = Guest("32")
    guest.cpu.cr4 = 0
    behind(guest, guest.entry(USER, 2), lambda entry: entry | PS)
    guest.cpu.write(USER, 1)
    assert guest.vm.audit().ok
    behind(guest, guest.entry(USER, 2), lambda entry: entry & ~PS)
    assert guest.vm.audit().ok


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_protection_key_lost(mode):
    """A key is part of the rights: a leaf with key 0 is open where the guest's entry has a key that PKRU closes."""
    guest = machine(mode)
    guest.map(USER + 6 * PAGE, UNUSED, pkey=5)
    guest.cpu.cr4 |= 1 << 22
    guest.cpu.read(USER + 6 * PAGE)
    assert guest.vm.audit().ok
    page, index = place(guest, USER + 6 * PAGE)
    guest.vm.mmu.writable_arrays()["table"][page, index] &= ~np.uint64(15 << 59)
    assert reported_at(guest, "I1", (page, index))


@every_mode
def test_leaf_for_stores_without_wp(mode):
    """With CR0.WP = 0 a leaf may be W against the guest's entry, if U is off and the entry is dirty: no violation. One
    that is U as well is one."""
    guest = machine(mode)
    guest.cpu.cr0 &= ~(1 << 16)
    guest.cpu.write(READ_ONLY, 1)
    page, index = place(guest, READ_ONLY)
    leaf = int(guest.vm.mmu.table(page)[index])
    assert leaf & W
    assert not leaf & U
    assert guest.vm.audit().ok
    guest.vm.mmu.writable_arrays()["table"][page, index] |= np.uint64(U)
    assert found(guest.vm) == [("I1", RIGHTS, page, index, guest.table(READ_ONLY))]


def test_active_list_that_is_a_ring():
    guest = machine("64")
    state = guest.vm.mmu.export_state()
    guest.vm.mmu.writable_arrays()["pages"]["next"][state["old"]] = state["young"]
    violations = found(guest.vm)
    assert {invariant for invariant, *_ in violations} == {"I6"}
    assert ("I6", SUM, None, 0, 0) in violations
    assert ("I6", LIST, state["young"], 0, gfn_of(guest, state["young"])) in violations


@every_mode
def test_page_that_survives_cr3_loads_by_mistake(mode):
    """`flush`: a page that holds a leaf without G has to go at a CR3 load, and is known by its mark."""
    guest = machine(mode, "flush")
    page, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["nonglobal"][page] = 0
    assert found(guest.vm) == [("I6", NONGLOBAL, page, 0, gfn_of(guest, page))]


# -- `flush` and `native` -----------------------------------------------------------------------------------------


@every_mode
def test_flush_may_lag_behind_the_tables(mode):
    """It learns of edits at INVLPG and register loads: I1 and I2 do not apply, the others do."""
    guest = machine(mode, "flush")
    behind(guest, guest.entry(USER), lambda entry: 0)
    guest.edit(ALIAS, 0)
    assert guest.vm.audit().ok
    page, index = place(guest, USER, 2)
    link = int(guest.vm.mmu.table(page)[index])
    for child in (free_page(guest), page):  # a page that is free; one that is not of the level below
        guest.vm.mmu.writable_arrays()["table"][page, index] = link & 0xFFF | guest.vm.memory.pool_hpa + child * PAGE
        violations = found(guest.vm)
        assert {v[0] for v in violations} == {"I4"}
        assert ("I4", CHILD, page, index, gfn_of(guest, page)) in violations
    guest.vm.mmu.writable_arrays()["table"][page, index] = link
    assert guest.vm.audit().ok


def test_native_has_only_counters():
    vm = sc.VM(memory=1 << 20, mmu="native")
    vm.vcpus[0].write(0, 1)
    report = vm.audit(strict=True)
    assert (report.ok, report.count, report.sptes, report.violations) == (True, 0, 0, ())
    state = vm.mmu.export_state()
    state["counters"][len(EXIT_REASONS) + COUNTERS.index("spte_installed")] = 1
    vm.mmu.import_state(state)
    assert found(vm) == [("I9", SPTES, None, 0, 0)]
