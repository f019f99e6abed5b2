"""The invariants: each has its own checker, and the checker's docstring is the invariant.

They read the structures of the MMU and the guest's tables; they change nothing. I8 and I9 apply to every design, the
others where sc_design.invariants says so: a design without shadow tables has no structure to check, and I1 and I2 do
not hold where shadows may lag behind the guest's tables, as a TLB does, until INVLPG or a register load. A design of
which only some tables lag has checkers of its own for I1 to I3, and further ones (sc_design.audit; lagging.pyx).

Whatever is in the arrays, the checkers stay within them and end. Where I3 to I7 hold, and I10 to I12 if there are
these, so does the engine: every index that it follows leads where the engine expects, and every list ends. So a
structure that was written by hand is checked by these before it is used (mmu_settle).

Past 500 lines, for it is one concept: nine invariants that hold one structure against another, a checker each.
"""
from dataclasses import dataclass

from libc.string cimport memset

from shadowcore.engine.absent cimport is_marker
from shadowcore.engine.backing cimport host_level, host_present
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_PS, SPTE_MARK, level_index, level_mask, pte_addr, pte_pkey, pte_rights,
)
from shadowcore.engine.counters cimport EXIT_FAULTS
from shadowcore.engine.invariants cimport (
    S_ABSENT, S_BOOKS, S_CHILD, S_CLEAN, S_COUNT, S_DIRTY_FREE, S_DYING, S_EXITS, S_FORMATS, S_FRAME, S_HASH,
    S_HEAD, S_HOST_TABLE, S_HW_ROOT, S_LEAF, S_LEVEL, S_LINK, S_LIST, S_MARKER, S_NESTED, S_NESTED_COUNT,
    S_NONGLOBAL, S_NO_LARGE, S_PARENT_FOREIGN, S_PARENT_MISSING, S_RIGHTS, S_RMAP_FOREIGN, S_RMAP_MISSING, S_ROOT,
    S_ROOTS, S_SHADOWED, S_SLOTS, S_SPTES, S_SUM, S_TABLE, S_TLB_LOG, S_TLB_SHADOW, S_TLB_STALE, S_TLB_TABLE,
    S_TWICE, S_UNPROTECTED, S_USED,
    SC_MAX_FINDINGS, audit_head_tells, audit_listed, audit_report, audit_stopped, entry_gpte, sc_audit, sc_finding,
)
from shadowcore.engine.memory cimport (
    SC_RUNNING, SC_WRITTEN, mem_frame, mem_frame_hpa, mem_gfn, mem_is_rom, mem_leaf_frame, mem_may_write, mem_pool_hpa,
    mem_pool_page, mem_slot, mem_unlogged, sc_no_frame,
)
from shadowcore.engine.nested.translated cimport in_host_tables, maps_host
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.policies.queues cimport queues_sound
from shadowcore.engine.pool cimport hash_bucket, pool_find
from shadowcore.engine.quirks cimport QUIRK_PAGING_OFF_UNPROTECTED, QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_ROLE_WITHOUT_MODE
from shadowcore.engine.rmap cimport list_first, list_next
from shadowcore.engine.role cimport (
    ROLE_GLEVELS, ROLE_GLOBAL, ROLE_PKEY, ROLE_PSE, ROLE_QUADRANT, ROLE_WP0, role_access, role_direct, role_field,
    role_invalid, role_level, role_nested, role_of_host, role_pte_size,
)
from shadowcore.engine.roots cimport root_fits, root_slots
from shadowcore.engine.spte cimport nonleaf_spte, spte_is_writable, spte_maps
from shadowcore.engine.state cimport REQUEST_OBSOLETE, memo_drop, page_is_dying, sc_mmu, sc_vcpu
from shadowcore.engine.tlb cimport sc_tlb, sc_tlb_entry, tlb_overdue, tlb_valid
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, MODE_32, MODE_64, MODE_LA57, MODE_OFF, RC_AUDIT, RC_OK, SC_NONE, u32, u64,
)

cdef enum:
    # I3 to I7, I10 to I15: what the engine follows leads somewhere.
    STRUCTURE = (1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14
                 | 1 << 15)

# What a finding says, by sc_finding.what.
SENTENCES = (
    "the shadow leaf maps a frame that the guest's entry does not name",
    "the shadow leaf grants more than the guest's tables do",
    "the shadow leaf is writable, the guest's entry is not dirty",
    "the guest's entry is not present, the shadow entry is",
    "the shadow entry leads to the shadow of another table than the guest's entry names",
    "a writable spte maps a frame that is a shadowed guest table",
    "a writable leaf is not in the reverse map of its frame, or not once",
    "the reverse map lists an entry that is not a writable leaf of the frame",
    "a present non-leaf entry points to no active page of the level below",
    "a present non-leaf entry is not among its child's parents, or not once",
    "the parents of a page list an entry that does not point to it",
    "the hash misses an active page, or holds it twice, or in the wrong bucket",
    "two active pages have the same gfn and role",
    "free pages and active pages do not add up to the pool",
    "a free page is not all zero",
    "the count or the bitmap of used entries is wrong",
    "the count of shadow pages of a frame is wrong",
    "a page's root count is not the number of root slots that hold it",
    "the root that the processor walks from is not the root that the vcpu holds",
    "page-fault exits are not the sum of their reasons",
    "present sptes are not those installed less those removed",
    "the active list does not lead back from its old end as it led there",
    "a page does not know of a memory slot that it maps",
    "a leaf table that has to go at a CR3 load is not marked so",
    "the count of pages by entry size of their guest tables is wrong",
    "a TLB entry outlives a flush that covers it",
    "a TLB entry lets stores reach a shadowed guest table unseen",
    "a TLB entry lets stores reach a frame whose dirty log does not show it",
    "a TLB entry leads where the shadow that it was made of does not lead any more, or allows stores that it does not",
    "an entry above the leaves is neither 0 nor a link to a page",
    "a leaf maps what is no frame of guest RAM",
    "the head of a list does not tell how many members it has",
    "a page in use has a level that there is not",
    "a root is not the page that its vcpu's registers ask for",
    "the shadow entry remembers a device that the guest's entry does not name, or that is RAM, or too many rights",
    "a leaf is not in the reverse map of what it maps, or not once",
    "the reverse map lists an entry that is not a leaf of what it stands for",
    "the count of leaves that map a frame is wrong",
    "the number of leaves, or of unsync pages, is not what the counter says",
    "the count of reasons against a large leaf is wrong",
    "a page that was zapped and is a root still has entries, parents or no vcpu that will let go of it",
    "a page is unsync that is no shadow of a guest's leaf table",
    "an entry leads to an unsync page, or to one with marks, and is not marked",
    "the marks of a page are not as many as it counts, or it is a leaf table and has some",
    "the root of an earlier CR3 is no root for that, or none that is in use",
    "the vcpu's roots are in sync, and marked: something below them may not be",
    "a leaf maps what the host has no page for, or no large one",
    "a writable leaf maps what the host, or the memory slot, lets nobody write",
    "the shadow entry is marked as not present in the guest's tables, and the guest's entry is present",
    "the policy's queues do not hold the pages in use, or do not end",
    "a guest table that the processor walks itself has a shadow, or the page that stands for it is not empty",
    "an entry of the host's tables leads to no table of theirs, or to one for other addresses",
    "the number of pages that stand for guest tables is not what the counter says",
)

assert len(SENTENCES) == S_COUNT


@dataclass(frozen=True)
class Violation:
    """`invariant` ("I1", ...) does not hold: `what`, at entry `index` of pool page `page` (None: the whole), `gfn`.

    >>> sc.Violation.__match_args__
    ('invariant', 'what', 'page', 'index', 'gfn')
    """

    invariant: str
    what: str
    page: int | None
    index: int
    gfn: int

    def __str__(self):
        where = f" (gfn {self.gfn:#x})" if self.gfn else ""
        if self.page is not None:
            where = f" (page {self.page}, entry {self.index}, gfn {self.gfn:#x})"
        return f"{self.invariant}: {self.what}{where}"


cdef tuple audit_violations(const sc_audit *a):
    """What `a` kept, as Violations."""
    cdef list found = []
    cdef sc_finding f
    for i in range(min(a.n, SC_MAX_FINDINGS)):
        f = a.found[i]
        found.append(Violation(f"I{f.invariant}", SENTENCES[f.what], None if f.page == SC_NONE else f.page, f.index,
                               f.gfn))
    return tuple(found)


cdef void _check_leaf(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, a leaf: it maps the frame its gpte names, with rights no wider than the guest's, and W only if the gpte is
    dirty; a leaf that is W and not U may stand for a supervisor store under CR0.WP = 0."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u64 spte = mmu.table[number * 512 + index]
    cdef u64 gfn = mem_gfn(mmu.mem, mem_leaf_frame(mmu.mem, spte))
    cdef u32 mode = role_field(page.role, ROLE_GLEVELS, 15)
    cdef u32 allowed = role_access(page.role)
    cdef u32 granted = pte_rights(spte)
    cdef u32 pkey = role_field(page.role, ROLE_PKEY, 15)
    cdef u64 gpte, named
    if mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        allowed = ACC_ALL
    if role_direct(page.role):
        named = page.gfn + index + (512 * role_field(page.role, ROLE_QUADRANT, 1) if mode == MODE_32 else 0)
    else:
        gpte = entry_gpte(mmu, page, index)
        if not gpte & PTE_P:
            audit_report(a, 1, S_ABSENT, number, index, page.gfn)
            return
        named = (gpte & (pte_addr() if role_pte_size(page.role) == 8 else 0xFFFFF000U)) >> 12
        allowed &= pte_rights(gpte)
        if granted & ACC_W and not gpte & PTE_D and not mem_is_rom(mmu.mem, page.gfn):
            audit_report(a, 1, S_CLEAN, number, index, page.gfn)
        pkey = pte_pkey(gpte)
    if named != gfn:
        audit_report(a, 1, S_FRAME, number, index, named)
    if role_field(page.role, ROLE_WP0, 1) or mmu.quirks & QUIRK_ROLE_WITHOUT_MODE:
        if not granted & ACC_U:
            allowed |= ACC_W
    if granted & ~allowed or (mode >= MODE_64 and pte_pkey(spte) != pkey and not (
            role_direct(page.role) and mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS)):
        audit_report(a, 1, S_RIGHTS, number, index, page.gfn)


cdef inline u64 _large_gfn(const sc_page *page, u64 gpte) noexcept nogil:
    """First frame of the large page that `gpte`, in the table behind `page`, maps."""
    if role_pte_size(page.role) == 8:
        return (gpte & pte_addr() & ~level_mask(role_level(page.role))) >> 12
    return ((gpte & 0xFFC00000U) | (((gpte >> 13) & 0xFF) << 32)) >> 12


cdef void _check_link(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, above the leaves: a present entry leads to the shadow of the table that its gpte names, (agile) to the page
    that stands for it, or to a direct page where the gpte is a large page."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u32 target = mem_pool_page(mmu.table[number * 512 + index])
    cdef sc_page *child
    cdef u64 gpte, named
    cdef u32 granted, allowed
    cdef bint large, for_large
    if role_direct(page.role) or target >= mmu.pool_pages:
        return                      # the latter is a matter of I4
    child = &mmu.pages[target]
    for_large = role_direct(child.role) and not role_nested(child.role)
    gpte = entry_gpte(mmu, page, index)
    if not gpte & PTE_P:
        audit_report(a, 1, S_ABSENT, number, index, page.gfn)
        return
    if not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        granted = role_access(child.role)
        allowed = role_access(page.role) & pte_rights(gpte)
        if for_large and not gpte & PTE_D and not mem_is_rom(mmu.mem, page.gfn):
            allowed &= ~<u32>ACC_W
        if granted & ~allowed or (granted != allowed and not for_large):
            audit_report(a, 1, S_RIGHTS, number, index, page.gfn)
    large = gpte & PTE_PS and role_level(page.role) <= 3 and (
        role_pte_size(page.role) == 8 or role_field(page.role, ROLE_PSE, 1)
        or mmu.quirks & QUIRK_ROLE_WITHOUT_MODE != 0)
    if for_large or large:
        if not (for_large and large):
            audit_report(a, 1, S_TABLE, number, index, page.gfn)
        elif _large_gfn(page, gpte) != child.gfn:
            audit_report(a, 1, S_FRAME, number, index, _large_gfn(page, gpte))
        elif not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS and (
                role_field(child.role, ROLE_GLOBAL, 1) != (gpte & PTE_G != 0)
                or (role_field(page.role, ROLE_GLEVELS, 15) >= MODE_64
                    and role_field(child.role, ROLE_PKEY, 15) != pte_pkey(gpte))):
            audit_report(a, 1, S_RIGHTS, number, index, page.gfn)
        return
    named = (gpte & (pte_addr() if role_pte_size(page.role) == 8 else 0xFFFFF000U)) >> 12
    if named != child.gfn:
        audit_report(a, 1, S_TABLE, number, index, page.gfn)


cdef void audit_marker(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, a marker of a page in sync. It may be wrong where the guest stores to its tables with paging off, unseen."""
    if (role_level(mmu.pages[number].role) != 1 or role_direct(mmu.pages[number].role)
            or entry_gpte(mmu, &mmu.pages[number], index) & PTE_P) and not mmu.quirks & QUIRK_PAGING_OFF_UNPROTECTED:
        audit_report(a, 1, S_MARKER, number, index, mmu.pages[number].gfn)


cdef void check_mappings(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I1: each present spte says what the guest's tables say, with rights no wider (mappings); a marker says that the
    gpte is not present."""
    cdef u32 number, index
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active:
            continue
        for index in range(512):
            if mmu.table[number * 512 + index] & PTE_P:
                if role_level(mmu.pages[number].role) == 1:
                    _check_leaf(mmu, number, index, a)
                else:
                    _check_link(mmu, number, index, a)
            elif is_marker(mmu.table[number * 512 + index]):
                audit_marker(mmu, number, index, a)


cdef void check_write_protection(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I2: no writable spte maps a gfn that a shadow page, not direct, shadows."""
    cdef u32 number, index
    cdef u64 frame
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_level(mmu.pages[number].role) != 1:
            continue
        for index in range(512):
            if spte_is_writable(mmu.table[number * 512 + index]):
                frame = mem_leaf_frame(mmu.mem, mmu.table[number * 512 + index])
                if frame < mmu.mem.nframes and mmu.frames[frame].shadowed:
                    audit_report(a, 2, S_UNPROTECTED, number, index, mem_gfn(mmu.mem, frame))


cdef void check_rmap(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I3: the reverse map of a gfn lists exactly the writable leaves that map it, each once. Leaves map frames."""
    cdef u32 number, index, spte, member
    cdef u64 frame
    cdef u64 leaves = 0
    cdef u64 listed = 0
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_level(mmu.pages[number].role) != 1:
            continue
        for index in range(512):
            spte = number * 512 + index
            frame = mem_leaf_frame(mmu.mem, mmu.table[spte])
            if not spte_is_writable(mmu.table[spte]):
                if mmu.table[spte] & PTE_P and mem_gfn(mmu.mem, frame) == sc_no_frame():
                    audit_report(a, 3, S_LEAF, number, index, mmu.pages[number].gfn)
                continue
            leaves += 1
            if mem_gfn(mmu.mem, frame) == sc_no_frame():
                audit_report(a, 3, S_LEAF, number, index, mmu.pages[number].gfn)
            elif not mmu.pages[number].slots >> mem_slot(mmu.mem, mem_gfn(mmu.mem, frame)) & 1:
                audit_report(a, 3, S_SLOTS, number, index, mem_gfn(mmu.mem, frame))
            if frame >= mmu.mem.nframes or not audit_listed(mmu, mmu.frames[frame].rmap, spte):
                audit_report(a, 3, S_RMAP_MISSING, number, index, mem_gfn(mmu.mem, frame))
    for frame in range(mmu.mem.nframes):
        member = list_first(mmu.frames[frame].rmap)
        while member:
            if (member > mmu.pool_pages * 512 or not spte_is_writable(mmu.table[member - 1])
                    or mem_leaf_frame(mmu.mem, mmu.table[member - 1]) != frame or listed >= leaves):
                audit_report(a, 3, S_RMAP_FOREIGN, (member - 1) >> 9, (member - 1) & 511, mem_gfn(mmu.mem, frame))
                break
            listed += 1
            member = list_next(mmu, mmu.frames[frame].rmap, member)
        if member == 0 and not audit_head_tells(mmu, mmu.frames[frame].rmap):
            audit_report(a, 3, S_HEAD, SC_NONE, 0, mem_gfn(mmu.mem, frame))
    if listed != leaves:
        audit_report(a, 3, S_RMAP_MISSING, SC_NONE, 0, 0)


cdef void check_backing(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I13: a leaf maps what the host has pages for, a large one a large page, and is writable only where a store needs
    nothing of the host, and the memory slot is not read-only."""
    cdef u32 number, index
    cdef u64 value, frame
    cdef int level
    if not mmu.mem.special:
        return
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        level = role_level(mmu.pages[number].role)
        if not mmu.pages[number].active:
            continue
        for index in range(512):
            value = mmu.table[number * 512 + index]
            if not spte_maps(value, level):
                continue
            frame = mem_leaf_frame(mmu.mem, value)
            if frame >= mmu.mem.nframes or mem_gfn(mmu.mem, frame) == sc_no_frame():
                continue            # a matter of I3
            if mmu.mem.host != NULL and (not host_present(mmu.mem.host, frame)
                                         or (level > 1 and host_level(mmu.mem.host, frame) == 1)):
                audit_report(a, 13, S_HOST_ABSENT, number, index, mem_gfn(mmu.mem, frame))
            if spte_is_writable(value) and not mem_may_write(mmu.mem, mem_gfn(mmu.mem, frame), frame):
                audit_report(a, 13, S_HOST_READ_ONLY, number, index, mem_gfn(mmu.mem, frame))


cdef void check_parents(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I4: parents and children agree, both ways; a large leaf (unsync) is no parent."""
    cdef u32 number, index, spte, child, member
    cdef u64 links = 0
    cdef u64 listed = 0
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_level(mmu.pages[number].role) == 1:
            continue
        for index in range(512):
            spte = number * 512 + index
            if not mmu.table[spte] & PTE_P:
                if mmu.table[spte]:
                    audit_report(a, 4, S_LINK, number, index, mmu.pages[number].gfn)
                continue
            if mmu.lists_all and mmu.table[spte] & PTE_PS and role_level(mmu.pages[number].role) <= 3:
                continue            # a large leaf: a matter of I11
            links += 1
            child = mem_pool_page(mmu.table[spte])
            if (child >= mmu.pool_pages or not mmu.pages[child].active
                    or role_level(mmu.pages[child].role) != role_level(mmu.pages[number].role) - 1):
                audit_report(a, 4, S_CHILD, number, index, mmu.pages[number].gfn)
            elif (mmu.table[spte] & ~<u64>SPTE_MARK) | PTE_A != nonleaf_spte(child):
                audit_report(a, 4, S_LINK, number, index, mmu.pages[number].gfn)
            elif not audit_listed(mmu, mmu.pages[child].parents, spte):
                audit_report(a, 4, S_PARENT_MISSING, number, index, mmu.pages[child].gfn)
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        member = list_first(mmu.pages[number].parents)
        while member:
            if (member > mmu.pool_pages * 512 or not mmu.table[member - 1] & PTE_P
                    or mmu.table[member - 1] & pte_addr() != mem_pool_hpa(number) or listed >= links):
                audit_report(a, 4, S_PARENT_FOREIGN, number, 0, mmu.pages[number].gfn)
                break
            listed += 1
            member = list_next(mmu, mmu.pages[number].parents, member)
        if member == 0 and not audit_head_tells(mmu, mmu.pages[number].parents):
            audit_report(a, 4, S_HEAD, number, 0, mmu.pages[number].gfn)
    if listed != links:
        audit_report(a, 4, S_PARENT_MISSING, SC_NONE, 0, 0)


cdef u32 _lost_at(const sc_mmu *mmu, u32 first) noexcept nogil:
    """Where the hash chain from page `first` goes astray: a page that does not exist, or `first` if it never ends."""
    cdef u32 number = first
    for _ in range(mmu.pool_pages + 1):
        if number >= mmu.pool_pages:
            return number
        number = mmu.pages[number].hash_next
    return first


cdef void check_hash(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I5: the hash holds every active page once, in its bucket, and (unsync) each that was zapped and is a root still;
    no two active pages have the same (gfn, role)."""
    cdef u64 bucket
    cdef u32 number, other, lost
    cdef u64 held = 0
    for bucket in range(<u64>1 << (64 - mmu.hash_shift)):
        lost = _lost_at(mmu, mmu.hash[bucket])
        if lost != SC_NONE:
            audit_report(a, 5, S_HASH, lost, 0, 0 if lost >= mmu.pool_pages else mmu.pages[lost].gfn)
            continue
        number = mmu.hash[bucket]
        while number != SC_NONE:
            if (not (mmu.pages[number].active or page_is_dying(&mmu.pages[number]))
                    or hash_bucket(mmu, mmu.pages[number].gfn) != bucket):
                audit_report(a, 5, S_HASH, number, 0, mmu.pages[number].gfn)
                break
            held += 1
            other = mmu.pages[number].hash_next
            while other != SC_NONE:
                if (mmu.pages[other].gfn == mmu.pages[number].gfn and mmu.pages[other].role == mmu.pages[number].role
                        and mmu.pages[number].active):
                    audit_report(a, 5, S_TWICE, number, 0, mmu.pages[number].gfn)
                    break
                other = mmu.pages[other].hash_next
            number = mmu.pages[number].hash_next
    if held != <u64>mmu.n_active + mmu.n_dying:
        audit_report(a, 5, S_HASH, SC_NONE, 0, 0)


cdef inline bint _unmarked(const sc_mmu *mmu, u32 number) noexcept nogil:
    """The page has none of what only pages in use have (unsync)."""
    cdef u32 word
    cdef u64 marks = 0
    for word in range(8):
        marks |= mmu.below[number * 8 + word]
    return not (marks or mmu.pages[number].unsync or mmu.pages[number].unsync_children or mmu.pages[number].flood
                or mmu.pages[number].parents)


cdef void check_pool(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I6: free pages are all zero; free + active = pool, with those (unsync) that were zapped and are roots still, and
    empty; what a page's header counts is what it holds."""
    cdef u32 number, index, used, previous
    cdef u32 active = 0
    cdef u32 dying = 0
    cdef u32 listed = 0
    cdef u32 free = 0
    cdef bint marked, global_
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        active += mmu.pages[number].active
        if page_is_dying(&mmu.pages[number]):
            dying += 1
            if mmu.pages[number].parents or mmu.pages[number].unsync:
                audit_report(a, 6, S_DYING, number, 0, mmu.pages[number].gfn)
        elif mmu.lists_all and not mmu.pages[number].active and not _unmarked(mmu, number):
            audit_report(a, 6, S_DIRTY_FREE, number, 0, mmu.pages[number].gfn)
        elif mmu.pages[number].active and role_invalid(mmu.pages[number].role):
            audit_report(a, 6, S_DYING, number, 0, mmu.pages[number].gfn)
        if mmu.pages[number].active and not 1 <= role_level(mmu.pages[number].role) <= MODE_LA57:
            audit_report(a, 6, S_LEVEL, number, 0, mmu.pages[number].gfn)
        used = 0
        global_ = True
        for index in range(512):
            marked = (mmu.pages[number].used[index >> 6] >> (index & 63)) & 1
            if marked != (mmu.table[number * 512 + index] != 0):
                audit_report(a, 6, S_USED if mmu.pages[number].active else S_DIRTY_FREE, number, index,
                             mmu.pages[number].gfn)
                break
            used += marked
            global_ = global_ and (not marked or is_marker(mmu.table[number * 512 + index])
                                   or mmu.table[number * 512 + index] & PTE_G != 0)
        else:
            if (not global_ and not mmu.pages[number].nonglobal and role_level(mmu.pages[number].role) == 1
                    and not mmu.lists_all):
                audit_report(a, 6, S_NONGLOBAL, number, 0, mmu.pages[number].gfn)
            if used != mmu.pages[number].present or (used and not mmu.pages[number].active):
                audit_report(a, 6, S_USED if mmu.pages[number].active else S_DIRTY_FREE, number, 0,
                             mmu.pages[number].gfn)
    number = mmu.young
    previous = SC_NONE
    while number < mmu.pool_pages and listed <= mmu.pool_pages:
        listed += 1
        if mmu.pages[number].prev != previous or mmu.pages[number].active != 1:
            audit_report(a, 6, S_LIST, number, 0, mmu.pages[number].gfn)
        previous = number
        number = mmu.pages[number].next
    if previous != mmu.old or number != SC_NONE:
        audit_report(a, 6, S_LIST, mmu.old, 0, 0)
    number = mmu.free_head
    while number < mmu.pool_pages and not mmu.pages[number].active and free <= mmu.pool_pages:
        free += 1
        number = mmu.pages[number].next
    if (number != SC_NONE or active != mmu.n_active or listed != active or free != mmu.n_free
            or dying != mmu.n_dying or free + active + dying != mmu.pool_pages or mmu.zapped != SC_NONE):
        audit_report(a, 6, S_SUM, SC_NONE, 0, 0)


cdef void _check_blocks(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """Counts of a block: shadow pages of guest tables in it, where the host has large pages."""
    cdef u64 frame
    cdef u64 reasons[2]
    cdef int i
    reasons[0] = reasons[1] = 0
    for frame in range(mmu.mem.nframes + 1):
        for i in range(2):
            # A block ends with the frame before, or RAM does.
            if frame and (frame & ((<u64>512 << 9 * i) - 1) == 0 or frame == mmu.mem.nframes):
                if mmu.no_large[i][(frame - 1) >> 9 * (i + 1)] != (reasons[i] if mmu.host_level > 1 else 0):
                    audit_report(a, 6, S_NO_LARGE, SC_NONE, i + 2, mem_gfn(mmu.mem, frame - 1))
                reasons[i] = 0
            if frame < mmu.mem.nframes:
                reasons[i] += mmu.frames[frame].shadowed


cdef void check_shadowed(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I6, per frame: the count of shadow pages by which a frame is known to be a guest table is right; (unsync) so is,
    for each block of frames, the count by which no large leaf maps it.

    They are counted by the hash, which has to be sound (I5)."""
    cdef u32 number, other
    cdef u64 frame
    cdef u64 pages = 0
    cdef u64 counted = 0
    cdef u32 same
    cdef u32 formats[2]
    formats[0] = formats[1] = 0
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_direct(mmu.pages[number].role):
            continue
        formats[role_pte_size(mmu.pages[number].role) == 8] += 1
        frame = mem_frame(mmu.mem, mmu.pages[number].gfn)
        if frame == sc_no_frame():
            continue
        pages += 1
        same = 0
        other = mmu.hash[hash_bucket(mmu, mmu.pages[number].gfn)]
        while other != SC_NONE:
            if (mmu.pages[other].gfn == mmu.pages[number].gfn and not role_direct(mmu.pages[other].role)
                    and mmu.pages[other].active):
                same += 1
            other = mmu.pages[other].hash_next
        if same != mmu.frames[frame].shadowed:
            audit_report(a, 6, S_SHADOWED, number, 0, mmu.pages[number].gfn)
    for frame in range(mmu.mem.nframes):
        counted += mmu.frames[frame].shadowed
    if counted != pages:
        audit_report(a, 6, S_SHADOWED, SC_NONE, 0, 0)
    if formats[0] != mmu.n_pte4 or formats[1] != mmu.n_pte8:
        audit_report(a, 6, S_FORMATS, SC_NONE, 0, 0)
    if mmu.lists_all:
        _check_blocks(mmu, a)


cdef void _check_hold(sc_mmu *mmu, const sc_vcpu *v, sc_audit *a) noexcept nogil:
    """I7, one vcpu whose roots are put in place before its guest goes on (unsync): none of them is, or all are, but for
    those of four that had to make room; a page that was zapped is let go of before that."""
    cdef u64 gfn
    cdef bint direct, wanted
    cdef int slot
    if not v.loaded and not v.requests:
        audit_report(a, 7, S_ROOT, SC_NONE, 0, 0)
    for slot in range(4):
        wanted = v.loaded and slot < root_slots(v) and mmu.design.root_of(mmu, v, slot, &gfn, &direct)
        if wanted != (v.roots[slot] != SC_NONE) and not (wanted and root_slots(v) == 4):
            audit_report(a, 7, S_ROOT, v.roots[slot], slot, 0)
        elif (wanted and v.roots[slot] < mmu.pool_pages and page_is_dying(&mmu.pages[v.roots[slot]])
              and not v.requests & REQUEST_OBSOLETE):
            audit_report(a, 7, S_DYING, v.roots[slot], slot, mmu.pages[v.roots[slot]].gfn)
    if v.loaded and v.root_cr3 != (0 if v.guest.mode == MODE_OFF else v.cr3):
        audit_report(a, 7, S_ROOT, v.roots[0], 0, 0)


cdef void check_roots(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I7: root counts equal the roots that vcpus hold, those of earlier CR3s too (unsync), and the processor walks from
    those, or, as long as its vcpu has requests, from nowhere; a root is active, and the page that its vcpu's registers
    ask for. One that was zapped is not active, and its vcpu has a request to let go of it (unsync)."""
    cdef u32 number, i, slot, held
    cdef const sc_vcpu *v
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        held = 0
        for i in range(mmu.n_vcpus):
            for slot in range(4):
                held += mmu.vcpus[i].roots[slot] == number
            for slot in range(mmu.prev_roots):
                held += mmu.vcpus[i].prev[slot].page == number
        if (held != mmu.pages[number].root_count
                or (held and not (mmu.pages[number].active or page_is_dying(&mmu.pages[number])))):
            audit_report(a, 7, S_ROOTS, number, 0, mmu.pages[number].gfn)
    for i in range(mmu.n_vcpus):
        v = mmu.vcpus[i]
        if mmu.lists_all:
            _check_hold(mmu, v, a)
        for slot in range(4):
            if v.roots[slot] == SC_NONE:
                if v.hw.pdpte[slot] & PTE_P:
                    audit_report(a, 7, S_HW_ROOT, SC_NONE, slot, 0)
                continue
            if (v.roots[slot] >= mmu.pool_pages
                    or v.hw.pdpte[slot] != (0 if v.requests else mem_pool_hpa(v.roots[slot]) | PTE_P)):
                audit_report(a, 7, S_HW_ROOT, v.roots[slot], slot, 0)
                continue
            if not root_fits(mmu, v, slot, v.roots[slot]):
                audit_report(a, 7, S_ROOT, v.roots[slot], slot, mmu.pages[v.roots[slot]].gfn)
        if v.guest.mode >= MODE_64 and v.hw.root != (
                0 if v.roots[0] == SC_NONE or v.requests else mem_pool_hpa(v.roots[0])):
            audit_report(a, 7, S_HW_ROOT, v.roots[0], 0, 0)


cdef void check_counters(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I9: counters agree: page-fault exits = sum of their reasons (unsync: with those at an entry that remembers a
    device, which KVM does not count among them); present sptes = installed - removed."""
    cdef u32 number, index
    cdef u64 reasons = 0
    cdef u64 present = 0
    for index in range(EXIT_FAULTS):
        reasons += mmu.stats.exits[index]
    if reasons != mmu.stats.pf_taken + mmu.stats.pf_mmio_spte_hit:
        audit_report(a, 9, S_EXITS, SC_NONE, 0, 0)
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if mmu.pages[number].active:
            for index in range(512):
                present += mmu.table[number * 512 + index] & PTE_P
    a.sptes = present
    if mmu.spte_base + mmu.stats.spte_installed - mmu.stats.spte_removed != present:
        audit_report(a, 9, S_SPTES, SC_NONE, 0, 0)


cdef bint audit_protected(const sc_mmu *mmu, u64 frame) noexcept nogil:
    """No store to RAM frame `frame` may pass unseen: it is a shadowed guest table, and (unsync) not one of which every
    page is unsync, and a leaf table."""
    cdef u64 gfn
    cdef u32 number
    cdef u32 steps = 0
    if mmu.frames[frame].shadowed == 0 or not mmu.lists_all:
        return mmu.frames[frame].shadowed != 0
    gfn = mem_gfn(mmu.mem, frame)
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number < mmu.pool_pages and steps < mmu.pool_pages:
        if (mmu.pages[number].gfn == gfn and mmu.pages[number].active and not role_direct(mmu.pages[number].role)
                and not (mmu.pages[number].unsync and role_level(mmu.pages[number].role) == 1)):
            return True
        number = mmu.pages[number].hash_next
        steps += 1
    return False


cdef bint _in_shadow(const sc_mmu *mmu, const sc_tlb_entry *e) noexcept nogil:
    """From the root at which its walk began, the entry's page still leads to the same frame, by a leaf that has W if
    the entry has. (Of other rights, a TLB may remember more than a leaf that was refreshed has, until INVLPG.)"""
    cdef u64 va = e.page
    cdef u64 frame = mem_frame(mmu.mem, e.gpa >> 12)
    cdef u64 value
    cdef u32 page = e.root
    cdef int level = 0
    if page < mmu.pool_pages:
        level = role_level(mmu.pages[page].role)
    while page < mmu.pool_pages and mmu.pages[page].active and role_level(mmu.pages[page].role) == level and level > 0:
        value = mmu.table[page * 512 + level_index(va, level)]
        if not value & PTE_P:
            return False
        if level == 1 or (mmu.lists_all and value & PTE_PS):
            return (frame != sc_no_frame() and not e.access & ~pte_rights(value) & ACC_W
                    and ((value & pte_addr()) | (va & level_mask(level) & pte_addr())) == mem_frame_hpa(mmu.mem, frame))
        page = mem_pool_page(value)
        level -= 1
    return False


cdef void _check_nested_tlb(sc_mmu *mmu, sc_audit *a, const sc_vcpu *v, u32 root) noexcept nogil:
    cdef const sc_tlb_entry *e
    cdef u32 n
    for n in range(v.tlb.nested.sets * v.tlb.nested.ways):
        e = &v.tlb.nested.entry[n]
        if e.page & 1 and e.mmu_epoch == mmu.flush_epoch and not maps_host(mmu, root, e):
            audit_report(a, 8, S_TLB_SHADOW, SC_NONE, n, e.page >> 12)


cdef void check_tlb(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I8: no TLB entry grants more than the guest's tables did at some moment since the last flush that covers it: it
    was filled after that flush. Under a shadow MMU the shadow still leads where it leads: what is withdrawn there is
    flushed. Nested, the host's tables still map the page. And none lets a store pass that the MMU has to see."""
    cdef u32 i, n, host
    cdef u32 bank
    cdef const sc_tlb *t
    cdef const sc_tlb_entry *e
    cdef u64 frame
    for i in range(mmu.n_vcpus):
        t = mmu.vcpus[i].tlb
        if t == NULL:
            continue
        host = mmu.vcpus[i].roots[0]
        if mmu.shadow and mmu.host_levels:
            host = pool_find(mmu, 0, role_of_host(mmu.host_levels))
        if mmu.host_levels:
            _check_nested_tlb(mmu, a, mmu.vcpus[i], host)
        for bank in range(t.banks):
            for n in range(t.bank[bank].sets * t.bank[bank].ways):
                e = &t.bank[bank].entry[n]
                if not tlb_valid(t, e, mmu.flush_epoch):
                    continue
                if tlb_overdue(t, e):
                    audit_report(a, 8, S_TLB_STALE, SC_NONE, n, e.page >> 12)
                if not mmu.shadow and not mmu.nested:
                    continue
                # Of a walk that went on below a mark (agile) no root is told.
                if not (in_host_tables(mmu, host, e) if mmu.nested or (mmu.host_levels and e.root == SC_NONE)
                        else _in_shadow(mmu, e)):
                    audit_report(a, 8, S_TLB_SHADOW, SC_NONE, n, e.page >> 12)
                if not (e.access & ACC_W and e.dirty):
                    continue
                frame = mem_frame(mmu.mem, e.gpa >> 12)
                if frame == sc_no_frame():
                    continue
                if audit_protected(mmu, frame):
                    audit_report(a, 8, S_TLB_TABLE, SC_NONE, n, e.gpa >> 12)
                if mem_unlogged(mmu.mem, e.gpa >> 12):
                    audit_report(a, 8, S_TLB_LOG, SC_NONE, n, e.gpa >> 12)


cdef void check_books(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I14: what the policy keeps of pages (queues, ghosts, an order) holds each page in use, and no other; every list
    of it ends."""
    if not queues_sound(mmu.policy.queues):
        audit_report(a, 14, S_BOOKS, SC_NONE, 0, 0)


cdef void check_nested(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I15: a guest table that the processor walks itself has no shadow, so that no leaf of the host's tables is without
    W for its sake; the page that stands for it is direct, and empty, so that nothing is below a mark. The host's tables
    lead to tables of theirs, for the addresses that they stand for; what their leaves map is a matter of I1."""
    cdef u32 number, index, child
    cdef u32 found = 0
    cdef u64 frame, value, first
    cdef int level
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active:
            continue
        level = role_level(mmu.pages[number].role)
        if role_nested(mmu.pages[number].role):
            found += 1
            frame = mem_frame(mmu.mem, mmu.pages[number].gfn)
            if (mmu.pages[number].present or mmu.pages[number].root_count or not role_direct(mmu.pages[number].role)
                    or (frame != sc_no_frame() and mmu.frames[frame].shadowed)):
                audit_report(a, 15, S_NESTED, number, 0, mmu.pages[number].gfn)
        elif mmu.pages[number].role == role_of_host(level) and level > 1:
            for index in range(512):
                value = mmu.table[number * 512 + index]
                child = mem_pool_page(value)
                first = mmu.pages[number].gfn + (<u64>index << 9 * (level - 1))
                if value & PTE_P and (child >= mmu.pool_pages or mmu.pages[child].role != role_of_host(level - 1)
                                      or mmu.pages[child].gfn != first):
                    audit_report(a, 15, S_HOST_TABLE, number, index, mmu.pages[number].gfn)
    if found != mmu.stats.nested_tables:
        audit_report(a, 15, S_NESTED_COUNT, SC_NONE, 0, 0)


cdef void _check(sc_mmu *mmu, sc_audit *a, u32 which) noexcept nogil:
    """The invariants `which` (bits by number) of the shadow structure."""
    cdef u32 found
    if which >> 6 & 1:
        check_pool(mmu, a)
    found = a.n
    if which >> 5 & 1:
        check_hash(mmu, a)
    if which >> 6 & 1 and a.n == found:
        check_shadowed(mmu, a)
    if which >> 4 & 1:
        check_parents(mmu, a)
    if which >> 3 & 1 and mmu.design.audit == NULL:
        check_rmap(mmu, a)
    if which >> 7 & 1:
        check_roots(mmu, a)
    if which >> 13 & 1:
        check_backing(mmu, a)
    if which >> 14 & 1:
        check_books(mmu, a)
    if which >> 15 & 1:
        check_nested(mmu, a)
    if mmu.design.audit != NULL:
        mmu.design.audit(mmu, a, which)
        return
    if which >> 1 & 1:
        check_mappings(mmu, a)
    if which >> 2 & 1:
        check_write_protection(mmu, a)


cdef int mmu_settle(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """The VM is to be used, and mem.busy is not 0. RC_OK, and it is 0, if the only reason was that the shadow structure
    was written by hand, nobody can write to it any more, and I3 to I7 (I10 to I15) hold. Else RC_AUDIT; a.n is not 0 if
    they do not."""
    a.n = 0
    if mmu.mem.busy != SC_WRITTEN or mmu.mem.lent:
        return RC_AUDIT
    mmu.mem.busy |= SC_RUNNING      # until this is done, nobody is lent anything
    memset(a, 0, sizeof(sc_audit))
    _check(mmu, a, mmu.design.invariants & STRUCTURE)
    memo_drop(mmu)                  # anything may have changed that a translation was made of
    mmu.mem.busy = SC_WRITTEN if a.n else 0
    return RC_AUDIT if a.n else RC_OK


cdef void audit_all(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """Run every checker that applies to the design."""
    memset(a, 0, sizeof(sc_audit))
    check_counters(mmu, a)
    check_tlb(mmu, a)
    _check(mmu, a, mmu.design.invariants)
