"""A machine that has used pages of every kind, ways to break it behind the engine's back, and what the audit then says.

The live arrays of the MMU are written, bytes of guest memory change without a store, registers and counters are put
back other than they were, flushes do not happen. A machine is audited before it is broken, so that what is reported
is what was done to it.
"""

import numpy as np
import pytest
from guest2007 import DATA, MODES, PAGE, RAM, USER, Guest

import shadowcore as sc

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
# Of design `unsync`.
DEVICE_ENTRY = (
    "the shadow entry remembers a device that the guest's entry does not name, or that is RAM, or too many rights"
)
LEAF_MISSING = "a leaf is not in the reverse map of what it maps, or not once"
LEAF_FOREIGN = "the reverse map lists an entry that is not a leaf of what it stands for"
MAPPED = "the count of leaves that map a frame is wrong"
GAUGE = "the number of leaves, or of unsync pages, is not what the counter says"
NO_LARGE = "the count of reasons against a large leaf is wrong"
DYING = "a page that was zapped and is a root still has entries, parents or no vcpu that will let go of it"
UNSYNC = "a page is unsync that is no shadow of a guest's leaf table"
MARK_MISSING = "an entry leads to an unsync page, or to one with marks, and is not marked"
MARKS = "the marks of a page are not as many as it counts, or it is a leaf table and has some"
PREVIOUS = "the root of an earlier CR3 is no root for that, or none that is in use"
HOST_ABSENT = "a leaf maps what the host has no page for, or no large one"
HOST_READ_ONLY = "a writable leaf maps what the host, or the memory slot, lets nobody write"
MARKER = "the shadow entry is marked as not present in the guest's tables, and the guest's entry is present"
"""Its case is in tests/unsync/test_markers.py: only machines with the setting have markers."""
LAGS = "the vcpu's roots are in sync, and marked: something below them may not be"

NONE = 0xFFFFFFFF  # no page
MANY = 0x80000000  # in the head of a list: of two and more
POOL = 40


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


def ways():
    """A list of cases, and the decorator that puts one there: a function that breaks a machine and returns all that
    shows it, as (invariant, sentence, page, index, gfn); the sentence that it is for, and the modes that have it."""
    cases = []

    def case(sentence, modes=MODES):
        def register(function):
            cases.extend(pytest.param(function, sentence, mode, id=f"{function.__name__}-{mode}") for mode in modes)
            return function

        return register

    return cases, case
