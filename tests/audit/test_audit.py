"""Each invariant broken by hand, and an audit that sees just that.

The state is broken behind the engine's back: through the live arrays of the MMU, by bytes of guest memory that change
without a store, by registers and counters put back other than they were, by flushes that do not happen. A machine is
audited before it is broken, so that what is reported is what was done to it.
"""

import numpy as np
import pytest
import ruins
from guest2007 import DATA, MODES, PAGE, RAM, USED, USER, A, D, Guest, P, U, W

import shadowcore as sc
from shadowcore.engine.counters import COUNTERS, EXIT_REASONS
from shadowcore.engine.invariants import SENTENCES
from shadowcore.pagetables import NX, PS

# What the audit says.
FRAME = "the shadow leaf maps a frame that the guest's entry does not name"
RIGHTS = "the shadow leaf grants more than the guest's tables do"
CLEAN = "the shadow leaf is writable, the guest's entry is not dirty"
ABSENT = "the guest's entry is not present, the shadow entry is"
TABLE = "the shadow entry leads to the shadow of another table than the guest's entry names"
UNPROTECTED = "a writable spte maps a frame that is a shadowed guest table"
RMAP_MISSING = "a writable leaf is not in the reverse map of its frame, or not once"
RMAP_FOREIGN = "the reverse map lists an entry that is not a writable leaf of the frame"
CHILD = "a present non-leaf entry points to no active page of the level below"
PARENT_MISSING = "a present non-leaf entry is not among its child's parents, or not once"
PARENT_FOREIGN = "the parents of a page list an entry that does not point to it"
HASH = "the hash misses an active page, or holds it twice, or in the wrong bucket"
TWICE = "two active pages have the same gfn and role"
SUM = "free pages and active pages do not add up to the pool"
DIRTY_FREE = "a free page is not all zero"
ENTRIES = "the count or the bitmap of used entries is wrong"
SHADOWED = "the count of shadow pages of a frame is wrong"
ROOTS = "a page's root count is not the number of root slots that hold it"
HW_ROOT = "the root that the processor walks from is not the root that the vcpu holds"
EXITS = "page-fault exits are not the sum of their reasons"
SPTES = "present sptes are not those installed less those removed"
LIST = "the active list does not lead back from its old end as it led there"
SLOTS = "a page does not know of a memory slot that it maps"
FORMATS = "the count of pages by entry size of their guest tables is wrong"
NONGLOBAL = "a leaf table that has to go at a CR3 load is not marked so"
TLB_STALE = "a TLB entry outlives a flush that covers it"
TLB_TABLE = "a TLB entry lets stores reach a shadowed guest table unseen"
TLB_LOG = "a TLB entry lets stores reach a frame whose dirty log does not show it"
TLB_SHADOW = (
    "a TLB entry leads where the shadow that it was made of does not lead any more, or allows stores that it does not"
)
LINK = "an entry above the leaves is neither 0 nor a link to a page"
LEAF = "a leaf maps what is no frame of guest RAM"
HEAD = "the head of a list does not tell how many members it has"
LEVEL = "a page in use has a level that there is not"
ROOT = "a root is not the page that its vcpu's registers ask for"

NONE = 0xFFFFFFFF  # no page
MANY = 0x80000000  # in the head of a list: of two and more
POOL = 40

every_mode = pytest.mark.parametrize("mode", MODES)

# Linear addresses in use besides USER; ALIAS leads to the same frame.
ALIAS = USER + (16 << 20)
READ_ONLY = ALIAS + PAGE
UNWRITTEN = ALIAS + 2 * PAGE
DEVICE = ALIAS + 3 * PAGE
LARGE = USER + (64 << 20)
UNUSED = DATA // 2  # a frame that no spte maps, with a smaller number than those that are mapped, but 0


def machine(mode, design=None):
    """A guest that has used pages of every kind."""
    guest = Guest(mode, design or sc.Shadow.cached(pool_pages=POOL))
    large = 1 << guest.tables.format.shift(2)
    guest.map(ALIAS, DATA)
    guest.map(READ_ONLY, DATA + PAGE, rights="rxu")
    guest.map(UNWRITTEN, DATA + 2 * PAGE, dirty=False)
    guest.map(DEVICE, RAM)
    guest.map(LARGE, 0, large, page_size=large)
    for va in (USER, ALIAS, LARGE):
        guest.cpu.write(va, 1)
    for va in (READ_ONLY, UNWRITTEN):
        guest.cpu.read(va)
    with pytest.raises(sc.MMIOAccess):
        guest.cpu.read(DEVICE)
    guest.see(guest.entry(USER))
    assert guest.vm.audit().ok
    return guest


def place(guest, va, level=1):
    """(pool page, index) of the shadow entry of `level` for `va`."""
    return next((page, index) for at, page, index, _ in guest.path(va) if at == level)


def spte(guest, va, level=1):
    """The number of that entry."""
    page, index = place(guest, va, level)
    return page * 512 + index


def gfn_of(guest, page):
    return int(guest.vm.mmu.arrays["pages"]["gfn"][page])


def behind(guest, gpa, change):
    """Give the guest's entry at `gpa` another value without a store that anybody could see."""
    entry = guest.vm.memory.bytes[gpa : gpa + guest.size].view(f"<u{guest.size}")
    entry[0] = change(int(entry[0]))


def free_page(guest):
    return int(np.flatnonzero(guest.vm.mmu.arrays["pages"]["active"] == 0)[-1])


def page_of(guest, **fields):
    return int(guest.pages(**fields)["page"][0])


def scalars(guest, **changed):
    """Put other values in place of the MMU's own."""
    guest.vm.mmu.import_state(guest.vm.mmu.export_state() | changed)


def found(vm):
    return [(v.invariant, v.what, v.page, v.index, v.gfn) for v in vm.audit().violations]


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


@pytest.mark.parametrize("mode", MODES)
def test_leaf_beyond_ram(mode):
    """The reverse map is of frames: what a leaf maps that is not writable is checked beside it."""
    guest = machine(mode)
    page, index = place(guest, READ_ONLY)
    guest.vm.mmu.writable_arrays()["table"][page, index] += np.uint64(RAM)
    assert ("I3", LEAF, page, index, gfn_of(guest, page)) in found(guest.vm)
    with pytest.raises(sc.AuditError):
        guest.cpu.read(READ_ONLY)


@case(HEAD)
def head_of_no_list_says_many(guest):
    guest.vm.mmu.writable_arrays()["frames"]["rmap"][UNUSED >> 12] = MANY
    return [("I3", HEAD, None, 0, UNUSED >> 12)]


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


# -- I8: flushes that do not happen -------------------------------------------------------------------------------


def with_tlb(design="cached", vcpus=1):
    """64-bit mode with a TLB, a window over the tables, and four pages from USER on."""
    vm = sc.VM(memory=RAM, mmu=design, tlb=sc.TLB(), vcpus=vcpus)
    tables = sc.PageTables(vm.memory, "64")
    tables.map(USER, DATA, 4 * PAGE, **USED)
    tables.map(0, 0, RAM, "rw", 4096, accessed=True, dirty=True)
    for cpu in vm.vcpus:
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
    return vm, tables


def only(vm, sentence, *besides):
    """The page numbers of which the audit finds `sentence`; it finds nothing else but `besides`."""
    violations = vm.audit().violations
    assert {(v.invariant, v.what, v.page) for v in violations} <= {("I8", s, None) for s in (sentence, *besides)}
    return {v.gfn for v in violations if v.what == sentence}


def move(vm, tables, va, gpa):
    """The guest's own store that leads `va` elsewhere; the flush that a shadow MMU would do of itself is lost."""
    vm.mmu.lose_flushes("store")
    vm.vcpus[0].write(tables.entry(va).gpa, gpa | P | W | U | A | D)


CALM = sc.Shadow.cached(flood_threshold=None)


@pytest.mark.parametrize("design", ["native", CALM, "flush"], ids=["native", "cached", "flush"])
@pytest.mark.parametrize(
    ("name", "flush"),
    [
        ("invlpg", lambda cpu: cpu.invlpg(USER + 123)),
        ("cr3", lambda cpu: setattr(cpu, "cr3", cpu.cr3)),
        ("context", lambda cpu: setattr(cpu, "cr4", cpu.cr4 ^ 1 << 7)),
    ],
    ids=["invlpg", "cr3", "context"],
)
def test_flush_of_the_guest_that_is_lost(design, name, flush):
    """Pages lead elsewhere by now. Until the guest flushes its TLB may know the old frames; after that it may not, and
    after a flush that was lost it does. (Under a shadow MMU, what the shadow has dropped by then leads nowhere there:
    in `cached` at the store, in `flush` at the INVLPG.)"""
    vm, tables = with_tlb(design)
    cpu = vm.vcpus[0]
    lagging = () if design == "native" else (TLB_SHADOW,)
    for number, lost in enumerate(((), (name,))):
        for i in range(2):
            cpu.write(USER + i * PAGE, 1)
        for i in range(2):
            move(vm, tables, USER + i * PAGE, UNUSED + (2 * number + i) * PAGE)
        assert only(vm, TLB_STALE, *lagging) == set()
        assert only(vm, TLB_SHADOW) <= ({USER + i * PAGE >> 12 for i in range(2)} if design is CALM else set())
        vm.mmu.lose_flushes("store", *lost)
        flush(cpu)
        stale = only(vm, TLB_STALE, *lagging)
        expected = {USER + i * PAGE >> 12 for i in range(1 if name == "invlpg" else 2)} if lost else set()
        if design == "flush":  # the pages that it zaps cost the TLB its entries in another way
            assert stale <= expected
        else:  # what led to the tables was in the TLB as well
            assert expected <= stale <= expected | ({tables.entry(USER).gpa >> 12} if lost else set())


@pytest.mark.parametrize("lost", [(), ("protect",)], ids=["done", "lost"])
def test_flush_of_write_protection_that_is_lost(lost):
    """A frame becomes a guest table while a TLB entry still lets stores through to it."""
    vm, tables = with_tlb()
    cpu = vm.vcpus[0]
    table, va = 0x300000, USER + (2 << 20)
    tables.set_entry(va, 2, table | P | W | U)
    cpu.write(table, DATA | P | W | U | A | D)
    vm.mmu.lose_flushes(*lost)
    assert vm.audit().ok
    cpu.read(va, user=True)
    assert only(vm, TLB_TABLE, TLB_SHADOW) == ({table >> 12} if lost else set())
    assert only(vm, TLB_SHADOW, TLB_TABLE) == ({table >> 12} if lost else set())


def test_flush_of_a_dirty_log_that_is_lost():
    vm, _ = with_tlb()
    vm.memory.start_dirty_log()
    cpu = vm.vcpus[0]
    for lost in ((), ("log",)):
        vm.mmu.lose_flushes(*lost)
        cpu.write(USER, 1)
        cpu.read(USER + 3 * PAGE)  # may be writable, and then is logged too
        assert vm.audit().ok
        vm.memory.clear_dirty_log()
        assert (DATA >> 12 in only(vm, TLB_LOG, TLB_SHADOW)) == bool(lost)
        assert (USER >> 12 in only(vm, TLB_SHADOW, TLB_LOG)) == bool(lost)


def test_violations_of_the_tlb_say_where():
    """A line of the report names the page: without it nobody can look further."""
    vm, tables = with_tlb("native")
    vm.vcpus[0].write(USER, 1)
    move(vm, tables, USER, UNUSED)
    vm.mmu.lose_flushes("invlpg")
    vm.vcpus[0].invlpg(USER)
    (violation,) = vm.audit().violations
    assert TLB_STALE in str(violation)
    assert f"{USER >> 12:#x}" in str(violation) or f"{USER:#x}" in str(violation)


# -- what a user sees ---------------------------------------------------------------------------------------------


def test_clean_report():
    guest = machine("64")
    report = guest.vm.audit()
    present = int(np.count_nonzero(guest.vm.memory.pool & np.uint64(1)))
    assert (report.ok, report.count, report.violations, report.sptes) == (True, 0, (), present)
    assert str(report) == f"audit clean, {present} sptes"
    assert guest.vm.audit(strict=True) == report


def test_broken_report():
    guest = machine("64")
    page, index = place(guest, USER)
    behind(guest, guest.entry(USER), lambda entry: entry & ~W)
    scalars(guest, n_free=0)
    report = guest.vm.audit()
    line = f"I1: {RIGHTS} (page {page}, entry {index}, gfn {guest.table(USER):#x})"
    assert (report.ok, report.count) == (False, 2)
    head, *lines = str(report).splitlines()
    assert head.startswith("2 violation")
    assert sorted(lines) == sorted([line, f"I6: {SUM}"])
    assert sc.Violation("I1", RIGHTS, page, index, guest.table(USER)) in report.violations


def test_strict_audit():
    guest = machine("64")
    page, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["root_count"][page] = 1
    report = guest.vm.audit()
    with pytest.raises(sc.AuditError) as caught:
        guest.vm.audit(strict=True)
    assert caught.value.violations == report.violations
    assert "I7" in str(caught.value)
    assert ROOTS in str(caught.value)


def test_more_violations_than_are_kept():
    """All are counted, the first 64 are kept; the report and the error give the number of all."""
    guest = Guest("64", pages=200)
    for i in range(200):
        guest.cpu.write(USER + i * PAGE, 1)
    assert guest.vm.audit().ok
    for i in range(200):
        behind(guest, guest.entry(USER + i * PAGE), lambda entry: entry & ~D)
    report = guest.vm.audit()
    assert (report.count, len(report.violations)) == (200, 64)
    assert {v.what for v in report.violations} == {CLEAN}
    assert str(report).startswith("200 violation")
    with pytest.raises(sc.AuditError, match="200 violation"):
        guest.vm.audit(strict=True)


def test_audit_changes_nothing():
    guest = machine("64")
    for break_it in (lambda: None, lambda: behind(guest, guest.entry(USER), lambda entry: 0)):
        break_it()
        arrays = {name: array.copy() for name, array in guest.vm.mmu.arrays.items()}
        state = guest.vm.mmu.export_state(), guest.cpu.export_state(), guest.vm.memory.bytes.tobytes()
        guest.vm.audit()
        assert state == (guest.vm.mmu.export_state(), guest.cpu.export_state(), guest.vm.memory.bytes.tobytes())
        for name, array in guest.vm.mmu.arrays.items():
            np.testing.assert_array_equal(array, arrays[name])


# -- a structure in ruins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ruins.NAMES)
def test_audit_of_ruins(name):
    """Whatever the arrays hold, an audit ends, and follows no index out of them."""
    ruins.in_a_process(name, seed=1, rounds=150)
