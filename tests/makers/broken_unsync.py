"""A machine of design `unsync` with pages of every kind, and ways to break it: see test_audit_unsync.py."""

import broken
import numpy as np
import pytest
from broken import ALIAS, DEVICE, LARGE, NONE, POOL, READ_ONLY, UNUSED, behind, free_page, place, scalars
from guest2007 import DATA, MODES, PAGE, RAM, USER, D, Guest, P, W

import shadowcore as sc
from shadowcore.engine.counters import COUNTERS, EXIT_REASONS
from shadowcore.pagetables import PS

LONG = ("64", "la57")
SENTENCES = {
    broken.DEVICE_ENTRY,
    broken.LEAF_MISSING,
    broken.LEAF_FOREIGN,
    broken.MAPPED,
    broken.GAUGE,
    broken.NO_LARGE,
    broken.DYING,
    broken.UNSYNC,
    broken.MARK_MISSING,
    broken.MARKS,
    broken.PREVIOUS,
    broken.LAGS,
}
"""What only this design can be found to be."""
MMU_W = 1 << 9
INVALID = 1 << 25
OBSOLETE = 1
ROOTS = 32


def machine(mode, **settings):
    """A guest with leaves of 4 KiB and 2 MiB, a device, an unsync table (that of USER), and, in long mode, the root of
    an earlier CR3; the table of ALIAS is in sync."""
    design = sc.Shadow.unsync(**{"pool_pages": POOL, "prefetch": 0, **settings})
    guest = Guest(mode, design, host_page_size="2MiB")
    large = 1 << guest.tables.format.shift(2)
    guest.map(ALIAS, DATA)
    guest.map(READ_ONLY, DATA + PAGE, rights="rxu")
    guest.map(DEVICE, RAM)
    guest.map(LARGE, 0, large, page_size=large)
    other = guest.address_space()
    guest.cpu.cr3 = other.root
    guest.cpu.read(USER)
    guest.cpu.cr3 = guest.tables.root
    for va in (USER, ALIAS, LARGE):
        guest.cpu.write(va, 1)
    guest.cpu.read(READ_ONLY)
    # A leaf for a table has W, and the table is unsync, from the first load on; the sync takes both away.
    guest.see(guest.entry(ALIAS), guest.entry(ALIAS, 2))
    guest.cpu.cr3 = guest.tables.root
    with pytest.raises(sc.MMIOAccess):
        guest.cpu.read(DEVICE)
    guest.edit(USER, guest.tables.entry(USER).value)
    guest.cpu.read(USER)
    assert guest.vm.stats.mmu_unsync == 1
    assert guest.vm.stats.pages_2m == 1
    assert guest.vm.audit().ok
    return guest


def pages(guest):
    return guest.vm.mmu.writable_arrays()["pages"]


def table(guest, where, value):
    guest.vm.mmu.writable_arrays()["table"][where] = value


def spte(guest, where):
    return int(guest.vm.mmu.arrays["table"][where])


def counter(guest, name, by=1):
    counters = guest.vm.mmu.export_state()["counters"]
    counters[len(EXIT_REASONS) + COUNTERS.index(name)] += by
    scalars(guest, counters=counters)


def dying(guest):
    """Zap everything: the roots go when the vcpu next runs. Their numbers."""
    roots = [root for root in guest.vm.mmu.roots() if root is not None]
    guest.vm.mmu.zap_all()
    assert guest.vm.mmu.export_state()["n_dying"] >= len(roots)
    assert guest.cpu.export_state()["requests"] & OBSOLETE
    assert guest.vm.audit().ok
    return roots


CASES = []


def case(*expected, modes=MODES):
    """A function that breaks a machine; what the audit then finds, as (invariant, sentence)."""

    def register(function):
        CASES.extend(pytest.param(function, expected, mode, id=f"{function.__name__}-{mode}") for mode in modes)
        return function

    return register


# I1: what synced pages say, the guest's tables say.


@case(("I1", broken.FRAME))
def gpte_names_another_frame(guest):
    behind(guest, guest.entry(ALIAS), lambda entry: entry - DATA + UNUSED)


@case(("I1", broken.RIGHTS))
def gpte_loses_w(guest):
    behind(guest, guest.entry(ALIAS), lambda entry: entry & ~W)


@case(("I1", broken.CLEAN))
def gpte_loses_d(guest):
    behind(guest, guest.entry(ALIAS), lambda entry: entry & ~D)


@case(("I1", broken.ABSENT))
def gpte_is_not_present(guest):
    behind(guest, guest.entry(ALIAS), lambda entry: entry & ~P)


@case(("I1", broken.TABLE))
def upper_gpte_names_another_table(guest):
    behind(guest, guest.entry(ALIAS, 2), lambda entry: guest.tables.entry(USER, 2).value)


@case(("I1", broken.CLEAN))
def gpte_of_a_large_leaf_loses_d(guest):
    behind(guest, guest.entry(LARGE, 2), lambda entry: entry & ~D)


@case(("I1", broken.FRAME))
def gpte_of_a_large_leaf_names_another_page(guest):
    behind(guest, guest.entry(LARGE, 2), lambda entry: entry + (1 << guest.tables.format.shift(2)))


@case(("I1", broken.TABLE))
def gpte_of_a_large_leaf_becomes_a_table(guest):
    behind(guest, guest.entry(LARGE, 2), lambda entry: entry & ~PS)


@case(("I1", broken.DEVICE_ENTRY))
def gpte_names_another_device(guest):
    behind(guest, guest.entry(DEVICE), lambda entry: entry + PAGE)


@case(("I1", broken.DEVICE_ENTRY))
def gpte_of_a_device_loses_w(guest):
    behind(guest, guest.entry(DEVICE), lambda entry: entry & ~W)


@case(("I1", broken.DEVICE_ENTRY))
def entry_remembers_a_device_where_there_is_ram(guest):
    where = place(guest, DEVICE)
    behind(guest, guest.entry(DEVICE), lambda entry: entry - RAM + UNUSED)
    table(guest, where, spte(guest, where) - RAM + UNUSED)


@case()
def gptes_of_an_unsync_page_are_anything(guest):
    """It lags: nothing that its table says now is known to it."""
    behind(guest, guest.entry(USER), lambda entry: 0)


# I2: no leaf lets stores reach what a synced page shadows, or a page above level 1.


@case(("I2", broken.UNPROTECTED))
def leaf_of_a_synced_table_gains_w(guest):
    where = place(guest, guest.window(guest.entry(ALIAS)))
    table(guest, where, spte(guest, where) | W | MMU_W)


@case(("I2", broken.UNPROTECTED))
def leaf_of_a_synced_table_would_gain_w_after_a_log(guest):
    where = place(guest, guest.window(guest.entry(ALIAS)))
    table(guest, where, spte(guest, where) | MMU_W)


@case(("I2", broken.UNPROTECTED))
def leaf_of_an_upper_table_gains_w(guest):
    where = place(guest, guest.window(guest.entry(ALIAS, 2)))
    table(guest, where, spte(guest, where) | W | MMU_W)


@case(("I2", broken.UNPROTECTED), ("I10", broken.GAUGE))
def page_is_called_synced(guest):
    """Stores to its table pass unseen all the same."""
    page, _ = place(guest, USER)
    pages(guest)["unsync"][page] = 0


# I3, I11: the reverse map of all leaves.


@case(("I3", broken.RMAP_MISSING), ("I11", broken.LEAF_MISSING), ("I11", broken.MAPPED))
def reverse_map_is_lost(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][DATA >> 12] = 0


@case(("I11", broken.LEAF_MISSING), ("I11", broken.MAPPED))
def reverse_map_misses_a_leaf_that_is_read_only(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][(DATA >> 12) + 1] = 0


@case(("I3", broken.RMAP_MISSING), ("I11", broken.LEAF_MISSING))
def reverse_map_of_large_leaves_is_lost(guest):
    guest.vm.mmu.writable_arrays()["large_rmap_2m"][0] = 0


@case(("I11", broken.LEAF_FOREIGN), ("I11", broken.MAPPED))
def reverse_map_lists_a_large_leaf(guest):
    page, index = place(guest, LARGE, 2)
    arrays = guest.vm.mmu.writable_arrays()
    arrays["frames"]["rmap"][UNUSED >> 12] = page * 512 + index + 1
    arrays["mapped"][UNUSED >> 12] = 1


@case(("I11", broken.LEAF_FOREIGN))
def reverse_map_of_large_leaves_lists_a_small_one(guest):
    page, index = place(guest, ALIAS)
    guest.vm.mmu.writable_arrays()["large_rmap_2m"][3] = page * 512 + index + 1


@case(("I11", broken.LEAF_FOREIGN))
def reverse_map_of_large_leaves_leads_beyond_the_pool(guest):
    guest.vm.mmu.writable_arrays()["large_rmap_1g"][0] = POOL * 512 + 1


@case(("I11", broken.HEAD))
def head_of_no_list_says_many(guest):
    guest.vm.mmu.writable_arrays()["large_rmap_2m"][2] = broken.MANY


@case(("I11", broken.MAPPED))
def leaves_of_a_frame_are_miscounted(guest):
    guest.vm.mmu.writable_arrays()["mapped"][DATA >> 12] += 1


@case(("I11", broken.GAUGE))
def large_leaves_are_miscounted(guest):
    counter(guest, "pages_2m")


@case(("I11", broken.GAUGE))
def leaves_are_miscounted(guest):
    counter(guest, "pages_4k")


@case(("I1", broken.FRAME), ("I11", broken.LEAF), ("I11", broken.LEAF_FOREIGN), ("I11", broken.LEAF_MISSING))
def large_leaf_does_not_map_a_whole_block(guest):
    where = place(guest, LARGE, 2)
    table(guest, where, spte(guest, where) + PAGE)
    # What the list stands for is the block, of which it maps a part.
    guest.vm.mmu.writable_arrays()["large_rmap_2m"][0] = 0
    guest.vm.mmu.writable_arrays()["large_rmap_2m"][1] = where[0] * 512 + where[1] + 1


# I4: a large leaf above level 3, where there is none, would be followed.


@case(("I4", broken.CHILD), ("I4", broken.PARENT_MISSING), modes=LONG)
def entry_of_the_root_is_a_large_leaf(guest):
    root = guest.vm.mmu.roots()[0]
    free = next(i for i in range(512) if not spte(guest, (root, i)))
    table(guest, (root, free), PS | P)
    headers = pages(guest)
    headers["used"][root, free >> 6] |= np.uint64(1 << (free & 63))
    headers["present"][root] += 1
    del headers
    scalars(guest, spte_base=guest.vm.mmu.export_state()["spte_base"] + 1)


# I5, I6: pages that were zapped and are roots still; what free pages do not have; blocks.


@case(("I5", broken.HASH), ("I6", broken.SUM), ("I6", broken.DIRTY_FREE), ("I7", broken.ROOT), ("I7", broken.ROOTS))
def a_root_that_goes_is_not_known_as_one(guest):
    """Its role is that of a page in use, but it is in no list of pages."""
    root = dying(guest)[0]
    headers = pages(guest)
    headers["role"][root] &= ~np.uint32(INVALID)
    headers["flood"][root] = 1


@case(("I5", broken.HASH), ("I6", broken.SUM))
def roots_that_go_are_miscounted(guest):
    dying(guest)
    scalars(guest, n_dying=guest.vm.mmu.export_state()["n_dying"] - 1)


@case(("I6", broken.DYING), ("I4", broken.PARENT_FOREIGN))
def a_root_that_goes_has_parents(guest):
    root = dying(guest)[0]
    pages(guest)["parents"][root] = 1


@case(("I6", broken.DYING))
def a_page_in_use_passes_for_zapped(guest):
    page, _ = place(guest, READ_ONLY)
    pages(guest)["role"][page] |= np.uint32(INVALID)


@case(("I6", broken.DIRTY_FREE))
def free_page_has_a_mark(guest):
    guest.vm.mmu.writable_arrays()["below"][free_page(guest), 3] = 1


@case(("I6", broken.DIRTY_FREE))
def free_page_counts_a_flood(guest):
    pages(guest)["flood"][free_page(guest)] = 1


@case(("I6", broken.NO_LARGE))
def reasons_against_a_large_leaf_are_miscounted(guest):
    guest.vm.mmu.writable_arrays()["no_large_2m"][1] += 1


@case(("I6", broken.NO_LARGE))
def reasons_against_a_gigabyte_are_miscounted(guest):
    guest.vm.mmu.writable_arrays()["no_large_1g"][0] -= 1


# I7: roots, those of earlier CR3s too.


@case(("I7", broken.ROOTS), modes=LONG)
def earlier_root_is_forgotten(guest):
    state = guest.cpu.export_state()
    guest.cpu.import_state(state | {"previous": [[0, NONE]] * len(state["previous"])})


@case(("I7", broken.DYING), ("I12", broken.PREVIOUS))
def nobody_is_asked_to_let_go_of_a_root(guest):
    dying(guest)
    guest.cpu.import_state(guest.cpu.export_state() | {"requests": ROOTS})
    if guest.mode not in LONG:
        guest.skipped = {("I12", broken.PREVIOUS)}


@case(("I7", broken.ROOT))
def root_is_for_another_cr3(guest):
    state = guest.cpu.export_state()
    guest.cpu.import_state(state | {"root_cr3": state["cr3"] + PAGE})


@case(("I7", broken.ROOT))
def roots_are_said_not_to_be_loaded(guest):
    guest.cpu.import_state(guest.cpu.export_state() | {"loaded": False, "requests": ROOTS, "root_cr3": 0})


# I9: faults at entries that remember a device.


@case(("I9", broken.EXITS))
def faults_at_devices_are_miscounted(guest):
    counter(guest, "pf_mmio_spte_hit")


# I10: marks.


@case(("I10", broken.UNSYNC), ("I10", broken.GAUGE))
def upper_page_is_unsync(guest):
    page, _ = place(guest, ALIAS, 2)
    pages(guest)["unsync"][page] = 1


@case(("I10", broken.MARK_MISSING), ("I10", broken.MARKS))
def a_mark_is_lost(guest):
    page, index = place(guest, USER, 2)
    guest.vm.mmu.writable_arrays()["below"][page, index >> 6] &= ~np.uint64(1 << (index & 63))


@case(("I10", broken.MARKS))
def marks_are_miscounted(guest):
    page, _ = place(guest, USER, 2)
    pages(guest)["unsync_children"][page] += 1


@case(("I10", broken.MARKS), ("I10", broken.MARK_MISSING))
def leaf_table_has_a_mark(guest):
    page = place(guest, ALIAS)[0]
    guest.vm.mmu.writable_arrays()["below"][page, 0] |= np.uint64(1)
    pages(guest)["unsync_children"][page] += 1


@case(("I10", broken.GAUGE))
def unsync_pages_are_miscounted(guest):
    counter(guest, "mmu_unsync")


@case()
def a_mark_too_many(guest):
    """With nothing below it: a walk that comes by takes it away."""
    page, index = place(guest, ALIAS, 2)
    arrays = guest.vm.mmu.writable_arrays()
    arrays["below"][page, index >> 6] |= np.uint64(1 << (index & 63))
    arrays["pages"]["unsync_children"][page] += 1


# I12: roots of earlier CR3s.


def previous(guest, change):
    state = guest.cpu.export_state()
    first = next(i for i, (_, page) in enumerate(state["previous"]) if page != NONE)
    state["previous"][first] = change(*state["previous"][first])
    guest.cpu.import_state(state)


@case(("I12", broken.PREVIOUS), modes=LONG)
def earlier_root_is_for_another_cr3(guest):
    previous(guest, lambda cr3, page: [cr3 + PAGE, page])


@case(("I12", broken.PREVIOUS), ("I7", broken.ROOTS), modes=LONG)
def earlier_root_is_the_present_one(guest):
    root = guest.vm.mmu.roots()[0]
    pages(guest)["root_count"][root] += 1
    previous(guest, lambda cr3, page: [cr3, root])
