"""Each invariant broken by hand (`broken`), and an audit that sees just that."""

import numpy as np
import pytest
from broken import (
    ABSENT,
    ALIAS,
    CHILD,
    CLEAN,
    DIRTY_FREE,
    ENTRIES,
    EXITS,
    FORMATS,
    FRAME,
    HASH,
    HEAD,
    HW_ROOT,
    LARGE,
    LEAF,
    LEVEL,
    LINK,
    LIST,
    MANY,
    NONE,
    NONGLOBAL,
    PARENT_FOREIGN,
    PARENT_MISSING,
    POOL,
    READ_ONLY,
    RIGHTS,
    RMAP_FOREIGN,
    RMAP_MISSING,
    ROOT,
    ROOTS,
    SHADOWED,
    SLOTS,
    SPTES,
    SUM,
    TABLE,
    TLB_LOG,
    TLB_SHADOW,
    TLB_STALE,
    TLB_TABLE,
    TWICE,
    UNPROTECTED,
    UNUSED,
    behind,
    found,
    free_page,
    gfn_of,
    machine,
    place,
    scalars,
    spte,
)
from guest2007 import DATA, MODES, PAGE, USER, D, P, U, W

from shadowcore.engine.counters import COUNTERS, EXIT_REASONS
from shadowcore.engine.invariants import SENTENCES
from shadowcore.pagetables import NX, PS

# -- one case for each way to break it: what the audit then finds -----------------------------------------------

CASES = []


def case(sentence, modes=MODES):
    """A function that breaks a machine and says what, besides, shows it: (invariant, sentence, page, index, gfn)."""

    def register(function):
        CASES.extend(pytest.param(function, sentence, mode, id=f"{function.__name__}-{mode}") for mode in modes)
        return function

    return register


@pytest.mark.parametrize(("break_it", "sentence", "mode"), CASES)
def test_broken(break_it, sentence, mode):
    guest = machine(mode)
    expected = break_it(guest)
    assert sentence in [what for _, what, *_ in expected]
    assert len({invariant for invariant, *_ in expected}) == 1
    assert sorted(found(guest.vm), key=repr) == sorted(expected, key=repr)


def test_each_sentence_has_a_case():
    by_hand = {case.values[1] for case in CASES} | {NONGLOBAL, TLB_STALE, TLB_TABLE, TLB_LOG, TLB_SHADOW}
    by_hand |= {LEAF, LEVEL, ROOT}
    assert by_hand == set(SENTENCES)


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


# I5: the hash. The page of LARGE is direct: no count of shadow pages goes by it.


def unhash(guest, number):
    """Take a page out of its bucket; the number of the bucket."""
    pages, hash_ = guest.vm.mmu.writable_arrays()["pages"], guest.vm.mmu.writable_arrays()["hash"]
    following = pages["hash_next"][number]
    before = [i for i in np.flatnonzero(pages["active"]) if i != number and pages["hash_next"][i] == number]
    if before:
        pages["hash_next"][before[0]] = following
        return None
    bucket = int(np.flatnonzero(hash_ == number)[0])
    hash_[bucket] = following
    return bucket


@case(HASH)
def hash_misses_a_page(guest):
    unhash(guest, place(guest, LARGE)[0])
    return [("I5", HASH, None, 0, 0)]


@case(HASH)
def page_is_in_another_bucket(guest):
    number, _ = place(guest, LARGE)
    bucket = unhash(guest, number)
    pages, hash_ = guest.vm.mmu.writable_arrays()["pages"], guest.vm.mmu.writable_arrays()["hash"]
    other = next(int(i) for i in np.flatnonzero(hash_ == NONE) if i != bucket)
    hash_[other] = number
    pages["hash_next"][number] = NONE
    return [("I5", HASH, number, 0, gfn_of(guest, number)), ("I5", HASH, None, 0, 0)]


@case(HASH)
def bucket_leads_out_of_the_pool(guest):
    hash_ = guest.vm.mmu.writable_arrays()["hash"]
    hash_[np.flatnonzero(hash_ == NONE)[0]] = POOL
    return [("I5", HASH, POOL, 0, 0)]


@case(TWICE, modes=["32"])
def two_pages_of_one_key(guest):
    """Two quarters of a directory that the guest has not used yet, and left for another."""
    first, second = (guest.vm.mmu.roots()[slot] for slot in (0, 2))
    guest.cpu.cr3 = UNUSED
    assert guest.vm.audit().ok
    role = guest.vm.mmu.writable_arrays()["pages"]["role"]
    role[first] = role[second]
    del role
    older = first  # in front of it in the bucket stands the newer one
    assert [v[:3] for v in found(guest.vm)] == [("I5", TWICE, max(older, second))]
    return [("I5", TWICE, second, 0, guest.tables.root >> 12)]


# I6: the pool, and what headers count.


@case(SUM)
def free_list_is_cut(guest):
    head = guest.vm.mmu.export_state()["free_head"]
    guest.vm.mmu.writable_arrays()["pages"]["next"][head] = NONE
    return [("I6", SUM, None, 0, 0)]


@case(SUM)
def active_list_is_cut(guest):
    state = guest.vm.mmu.export_state()
    guest.vm.mmu.writable_arrays()["pages"]["next"][state["young"]] = NONE
    return [("I6", SUM, None, 0, 0), ("I6", LIST, state["old"], 0, gfn_of(guest, state["old"]))]


@case(LIST)
def active_list_does_not_lead_back(guest):
    """Recycling takes that way."""
    old = guest.vm.mmu.export_state()["old"]
    guest.vm.mmu.writable_arrays()["pages"]["prev"][old] = NONE
    return [("I6", LIST, old, 0, gfn_of(guest, old))]


@case(LIST)
def active_list_ends_elsewhere(guest):
    old = int(guest.vm.mmu.arrays["pages"]["prev"][guest.vm.mmu.export_state()["old"]])
    scalars(guest, old=old)
    return [("I6", LIST, old, 0, gfn_of(guest, old))]


@case(LIST)
def active_list_begins_elsewhere(guest):
    young = int(guest.vm.mmu.arrays["pages"]["next"][guest.vm.mmu.export_state()["young"]])
    scalars(guest, young=young)
    return [("I6", SUM, None, 0, 0), ("I6", LIST, young, 0, gfn_of(guest, young))]


@case(FORMATS)
def tables_of_8_byte_entries_are_miscounted(guest):
    """Whether accessed bits can hit a table that another mode reads otherwise is judged by these counts."""
    scalars(guest, n_pte8=guest.vm.mmu.export_state()["n_pte8"] + 1)
    return [("I6", FORMATS, None, 0, 0)]


@case(FORMATS)
def tables_of_4_byte_entries_are_miscounted(guest):
    scalars(guest, n_pte4=guest.vm.mmu.export_state()["n_pte4"] + 1)
    return [("I6", FORMATS, None, 0, 0)]


@case(SUM)
def a_page_is_counted_as_free(guest):
    scalars(guest, n_free=guest.vm.mmu.pages_free + 1)
    return [("I6", SUM, None, 0, 0)]


@case(DIRTY_FREE)
def free_page_holds_an_entry(guest):
    number = free_page(guest)
    guest.vm.mmu.writable_arrays()["table"][number, 7] = 1 << 12
    return [("I6", DIRTY_FREE, number, 7, gfn_of(guest, number))]


@case(DIRTY_FREE)
def free_page_has_a_bit_in_its_bitmap(guest):
    number = free_page(guest)
    guest.vm.mmu.writable_arrays()["pages"]["used"][number, 7] = 1 << 63
    return [("I6", DIRTY_FREE, number, 511, gfn_of(guest, number))]


@case(ENTRIES)
def count_of_entries_is_wrong(guest):
    number, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["present"][number] += 1
    return [("I6", ENTRIES, number, 0, gfn_of(guest, number))]


@case(ENTRIES)
def bitmap_misses_an_entry(guest):
    number, index = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["used"][number, index // 64] &= ~np.uint64(1 << index % 64)
    return [("I6", ENTRIES, number, index, gfn_of(guest, number))]


@case(SHADOWED)
def frame_counts_a_shadow_page_too_many(guest):
    gfn = guest.table(USER)
    guest.vm.mmu.writable_arrays()["frames"]["shadowed"][gfn] += 1
    return [("I6", SHADOWED, place(guest, USER)[0], 0, gfn), ("I6", SHADOWED, None, 0, 0)]


@case(SHADOWED)
def frame_without_shadow_pages_counts_one(guest):
    guest.vm.mmu.writable_arrays()["frames"]["shadowed"][UNUSED >> 12] = 1
    return [("I6", SHADOWED, None, 0, 0)]


# I7: roots.


@case(ROOTS)
def root_is_counted_twice(guest):
    root = guest.path(USER)[0][1]
    guest.vm.mmu.writable_arrays()["pages"]["root_count"][root] += 1
    return [("I7", ROOTS, root, 0, gfn_of(guest, root))]


@case(ROOTS)
def page_counts_as_a_root(guest):
    page, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["root_count"][page] = 1
    return [("I7", ROOTS, page, 0, gfn_of(guest, page))]


@case(ROOTS)
def vcpu_loses_its_roots(guest):
    roots = [root for root in guest.vm.mmu.roots() if root is not None]
    guest.cpu.import_state(guest.cpu.export_state() | {"roots": [NONE] * 4})
    return [("I7", ROOTS, root, 0, gfn_of(guest, root)) for root in roots]


@case(HW_ROOT, modes=("64", "la57"))
def processor_walks_from_another_root(guest):
    """The root stands in a slot that these modes do not have: the processor has it, the vcpu does not."""
    state = guest.cpu.export_state()
    guest.cpu.import_state(state | {"roots": [NONE, state["roots"][0], NONE, NONE]})
    return [("I7", HW_ROOT, None, 0, 0)]


# I9: counters.


@case(EXITS)
def exit_without_a_reason(guest):
    counters = guest.vm.mmu.export_state()["counters"]
    counters[len(EXIT_REASONS) + COUNTERS.index("pf_taken")] += 1
    scalars(guest, counters=counters)
    return [("I9", EXITS, None, 0, 0)]


@case(EXITS)
def reason_without_an_exit(guest):
    counters = guest.vm.mmu.export_state()["counters"]
    counters[EXIT_REASONS.index("fill")] += 1
    scalars(guest, counters=counters)
    return [("I9", EXITS, None, 0, 0)]


@case(SPTES)
def spte_vanishes_without_being_counted(guest):
    page, index = place(guest, READ_ONLY)
    guest.vm.mmu.writable_arrays()["table"][page, index] &= ~np.uint64(P)
    return [("I9", SPTES, None, 0, 0)]


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
