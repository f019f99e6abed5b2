"""Ways to break what pages are counted and found by: the hash, the pool, roots and counters."""

import numpy as np
from broken import (
    DIRTY_FREE,
    ENTRIES,
    EXITS,
    FORMATS,
    HASH,
    HW_ROOT,
    LARGE,
    LIST,
    NONE,
    POOL,
    READ_ONLY,
    ROOTS,
    SHADOWED,
    SPTES,
    SUM,
    TWICE,
    UNUSED,
    found,
    free_page,
    gfn_of,
    place,
    scalars,
    ways,
)
from guest2007 import USER, P

from shadowcore.engine.counters import COUNTERS, EXIT_REASONS

CASES, case = ways()

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
