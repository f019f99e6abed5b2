"""Ways to break what entries say: those of shadow tables, of reverse maps and of lists of parents."""

import numpy as np
from broken import (
    ABSENT,
    ALIAS,
    CHILD,
    CLEAN,
    FRAME,
    HEAD,
    LARGE,
    LINK,
    MANY,
    PARENT_FOREIGN,
    PARENT_MISSING,
    POOL,
    READ_ONLY,
    RIGHTS,
    RMAP_FOREIGN,
    RMAP_MISSING,
    SLOTS,
    TABLE,
    UNPROTECTED,
    UNUSED,
    behind,
    gfn_of,
    place,
    spte,
    ways,
)
from guest2007 import DATA, PAGE, USER, D, P, U, W

from shadowcore.pagetables import NX, PS

CASES, case = ways()

# I1: what the shadow says, the guest's tables say.


@case(FRAME)
def gpte_names_another_frame(guest):
    page, index = place(guest, USER)
    behind(guest, guest.entry(USER), lambda entry: entry - DATA + UNUSED)
    return [("I1", FRAME, page, index, UNUSED >> 12)]


@case(FRAME)
def spte_maps_another_frame(guest):
    """A leaf that is not writable, so that no reverse map is concerned."""
    page, index = place(guest, READ_ONLY)
    guest.vm.mmu.writable_arrays()["table"][page, index] += np.uint64(PAGE)
    return [("I1", FRAME, page, index, (DATA >> 12) + 1)]


@case(FRAME)
def spte_of_a_large_page_maps_another_frame(guest):
    guest.cpu.read(LARGE + 8 * PAGE)
    page, index = place(guest, LARGE + 8 * PAGE)
    table = guest.vm.mmu.writable_arrays()["table"]
    number = page * 512 + index
    table[page, index] += np.uint64(PAGE)
    frames = guest.vm.mmu.writable_arrays()["frames"]
    frames["rmap"][[8, 9]] = 0, number + 1
    return [("I1", FRAME, page, index, 8)]


@case(RIGHTS)
def gpte_loses_w(guest):
    page, index = place(guest, USER)
    behind(guest, guest.entry(USER), lambda entry: entry & ~W)
    return [("I1", RIGHTS, page, index, guest.table(USER))]


@case(RIGHTS)
def gpte_loses_u(guest):
    page, index = place(guest, READ_ONLY)
    behind(guest, guest.entry(READ_ONLY), lambda entry: entry & ~U)
    return [("I1", RIGHTS, page, index, guest.table(READ_ONLY))]


@case(RIGHTS, modes=("pae", "64", "la57"))
def gpte_becomes_no_execute(guest):
    page, index = place(guest, READ_ONLY)
    behind(guest, guest.entry(READ_ONLY), lambda entry: entry | NX)
    return [("I1", RIGHTS, page, index, guest.table(READ_ONLY))]


@case(RIGHTS)
def spte_gains_w_against_the_gpte(guest):
    """With its record in the reverse map: only the rights are wrong."""
    page, index = place(guest, READ_ONLY)
    behind(guest, guest.entry(READ_ONLY), lambda entry: entry | D)
    guest.vm.mmu.writable_arrays()["table"][page, index] |= np.uint64(W)
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][(DATA >> 12) + 1] = page * 512 + index + 1
    return [("I1", RIGHTS, page, index, guest.table(READ_ONLY))]


@case(CLEAN)
def gpte_loses_d(guest):
    page, index = place(guest, USER)
    behind(guest, guest.entry(USER), lambda entry: entry & ~D)
    return [("I1", CLEAN, page, index, guest.table(USER))]


@case(ABSENT)
def gpte_is_not_present(guest):
    page, index = place(guest, USER)
    behind(guest, guest.entry(USER), lambda entry: entry & ~P)
    return [("I1", ABSENT, page, index, guest.table(USER))]


@case(ABSENT)
def upper_gpte_is_not_present(guest):
    page, index = place(guest, USER, 2)
    behind(guest, guest.entry(USER, 2), lambda entry: entry & ~P)
    return [("I1", ABSENT, page, index, guest.table(USER, 2))]


@case(TABLE)
def upper_gpte_names_another_table(guest):
    page, index = place(guest, USER, 2)
    behind(guest, guest.entry(USER, 2), lambda entry: guest.tables.entry(ALIAS, 2).value)
    return [("I1", TABLE, page, index, guest.table(USER, 2))]


@case(TABLE)
def large_gpte_becomes_a_table(guest):
    page, index = place(guest, LARGE, 2)
    behind(guest, guest.entry(LARGE, 2), lambda entry: entry & ~PS)
    return [("I1", TABLE, page, index, guest.table(LARGE, 2))]


# I2: no writable spte maps a shadowed guest table.


@case(UNPROTECTED)
def leaf_of_a_table_gains_w(guest):
    gpa = guest.entry(USER)
    page, index = place(guest, guest.window(gpa))
    assert not guest.vm.mmu.table(page)[index] & np.uint64(W)
    guest.vm.mmu.writable_arrays()["table"][page, index] |= np.uint64(W)
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][gpa >> 12] = page * 512 + index + 1
    return [("I2", UNPROTECTED, page, index, gpa >> 12)]


# I3: the reverse map. Frame DATA has two writable leaves: ALIAS, the newer, and USER.


@case(RMAP_MISSING)
def reverse_map_is_lost(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][DATA >> 12] = 0
    return [
        *[("I3", RMAP_MISSING, *place(guest, va), DATA >> 12) for va in (USER, ALIAS)],
        ("I3", RMAP_MISSING, None, 0, 0),
    ]


@case(RMAP_MISSING)
def reverse_map_forgets_one_of_two(guest):
    assert guest.vm.mmu.arrays["frames"]["rmap"][DATA >> 12] == MANY | (spte(guest, ALIAS) + 1)
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][DATA >> 12] &= ~np.uint32(MANY)
    return [("I3", RMAP_MISSING, *place(guest, USER), DATA >> 12), ("I3", RMAP_MISSING, None, 0, 0)]


@case(RMAP_MISSING)
def neighbours_in_a_list_disagree(guest):
    """Going forward the list is whole; the way back leads elsewhere."""
    number = spte(guest, USER)
    guest.vm.mmu.writable_arrays()["links"]["prev"][number] = spte(guest, LARGE) + 1
    return [("I3", RMAP_MISSING, *place(guest, va), DATA >> 12) for va in (USER, ALIAS)]


@case(RMAP_FOREIGN)
def reverse_map_lists_a_leaf_of_another_frame(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][UNUSED >> 12] = spte(guest, LARGE) + 1
    return [("I3", RMAP_FOREIGN, *place(guest, LARGE), UNUSED >> 12)]


@case(RMAP_FOREIGN)
def reverse_map_lists_a_leaf_that_is_not_writable(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][(DATA >> 12) + 1] = spte(guest, READ_ONLY) + 1
    return [("I3", RMAP_FOREIGN, *place(guest, READ_ONLY), (DATA >> 12) + 1)]


@case(RMAP_FOREIGN)
def reverse_map_lists_an_entry_beyond_the_pool(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][UNUSED >> 12] = POOL * 512 + 1
    return [("I3", RMAP_FOREIGN, POOL, 0, UNUSED >> 12)]


@case(SLOTS)
def page_forgets_the_slot_that_it_maps(guest):
    """A dirty log finds the writable leaves of a slot by that."""
    page, index = place(guest, LARGE)
    guest.vm.mmu.writable_arrays()["pages"]["slots"][page] = 0
    return [("I3", SLOTS, page, index, 0)]


# I4: parents and children.


@case(CHILD)
def upper_spte_leads_out_of_the_pool(guest):
    page, index = place(guest, USER, 2)
    child, _ = place(guest, USER)
    arrays = guest.vm.mmu.writable_arrays()
    arrays["table"][page, index] += np.uint64(POOL * PAGE)
    arrays["pages"]["parents"][child] = 0
    return [("I4", CHILD, page, index, gfn_of(guest, page)), ("I4", PARENT_MISSING, None, 0, 0)]


@case(PARENT_MISSING)
def page_forgets_its_parents(guest):
    page, index = place(guest, USER, 2)
    child, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["parents"][child] = 0
    return [("I4", PARENT_MISSING, page, index, gfn_of(guest, child)), ("I4", PARENT_MISSING, None, 0, 0)]


@case(PARENT_FOREIGN)
def page_claims_a_parent(guest):
    """The root says that the entry which leads to another page leads to it."""
    root = guest.path(USER)[0][1]
    guest.vm.mmu.writable_arrays()["pages"]["parents"][root] = spte(guest, USER, 2) + 1
    return [("I4", PARENT_FOREIGN, root, 0, gfn_of(guest, root))]


@case(PARENT_FOREIGN)
def page_claims_a_parent_beyond_the_pool(guest):
    root = guest.path(USER)[0][1]
    guest.vm.mmu.writable_arrays()["pages"]["parents"][root] = POOL * 512 + 1
    return [("I4", PARENT_FOREIGN, root, 0, gfn_of(guest, root))]


# What only what is written by hand can be, and what the engine would follow.


@case(LINK)
def upper_entry_of_a_device(guest):
    """Only leaves remember a device by an entry that is not present."""
    page, _ = place(guest, USER, 2)
    free = next(i for i in range(512) if not guest.vm.mmu.table(page)[i])
    guest.vm.mmu.writable_arrays()["table"][page, free] = 1 << 63
    guest.vm.mmu.writable_arrays()["pages"]["used"][page, free >> 6] |= np.uint64(1 << (free & 63))
    guest.vm.mmu.writable_arrays()["pages"]["present"][page] += 1
    return [("I4", LINK, page, free, gfn_of(guest, page))]


@case(LINK)
def upper_entry_is_a_large_page(guest):
    page, index = place(guest, USER, 2)
    guest.vm.mmu.writable_arrays()["table"][page, index] |= np.uint64(PS)
    return [("I4", LINK, page, index, gfn_of(guest, page))]


@case(HEAD)
def head_of_no_list_says_many(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][UNUSED >> 12] = MANY
    return [("I3", HEAD, None, 0, UNUSED >> 12)]
