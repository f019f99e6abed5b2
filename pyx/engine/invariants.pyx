"""The invariants: each has its own checker, and the checker's docstring is the invariant.

They read the structures of the MMU and the guest's tables; they change nothing. I8 and I9 apply to every design, the
others where sc_design.invariants says so: a design without shadow tables has no structure to check, and I1 and I2 do
not hold where shadows may lag behind the guest's tables, as a TLB does, until INVLPG or a register load.

Whatever is in the arrays, the checkers stay within them and end. Where I3 to I7 hold, so does the engine: every index
that it follows leads where the engine expects, and every list ends. So a structure that was written by hand is checked
by these before it is used (mmu_settle).

Past 500 lines, for it is one concept: nine invariants that hold one structure against another, a checker each.
"""
from dataclasses import dataclass

from libc.string cimport memset

from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_PS, SPTE_MARK, level_index, level_mask, pte_addr, pte_pkey, pte_rights,
)
from shadowcore.engine.counters cimport EXIT_FAULTS
from shadowcore.engine.invariants cimport SC_MAX_FINDINGS, sc_audit, sc_finding
from shadowcore.engine.memory cimport (
    SC_RUNNING, SC_WRITTEN, mem_frame, mem_frame_hpa, mem_gfn, mem_guest_frame, mem_leaf_frame, mem_pool_hpa,
    mem_pool_page, mem_slot, mem_unlogged, sc_no_frame,
)
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.pool cimport hash_bucket
from shadowcore.engine.quirks cimport QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_ROLE_WITHOUT_MODE
from shadowcore.engine.rmap cimport LIST_MANY, list_first, list_next
from shadowcore.engine.role cimport (
    ROLE_GLEVELS, ROLE_GLOBAL, ROLE_PKEY, ROLE_PSE, ROLE_QUADRANT, ROLE_WP0, role_access, role_direct, role_field,
    role_level, role_pte_size,
)
from shadowcore.engine.roots cimport root_fits
from shadowcore.engine.spte cimport nonleaf_spte, spte_is_writable
from shadowcore.engine.state cimport memo_drop, sc_mmu, sc_vcpu
from shadowcore.engine.tlb cimport TLB_SIZES, sc_tlb, sc_tlb_entry, tlb_overdue, tlb_valid
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, MODE_32, MODE_64, MODE_LA57, RC_AUDIT, RC_OK, SC_NONE, u8, u32, u64,
)
from shadowcore.engine.watch cimport watch_due, watch_look

cdef enum:
    STRUCTURE = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7      # I3 to I7: what the engine follows leads somewhere

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
)

cdef enum:
    S_FRAME = 0
    S_RIGHTS
    S_CLEAN
    S_ABSENT
    S_TABLE
    S_UNPROTECTED
    S_RMAP_MISSING
    S_RMAP_FOREIGN
    S_CHILD
    S_PARENT_MISSING
    S_PARENT_FOREIGN
    S_HASH
    S_TWICE
    S_SUM
    S_DIRTY_FREE
    S_USED
    S_SHADOWED
    S_ROOTS
    S_HW_ROOT
    S_EXITS
    S_SPTES
    S_LIST
    S_SLOTS
    S_NONGLOBAL
    S_FORMATS
    S_TLB_STALE
    S_TLB_TABLE
    S_TLB_LOG
    S_TLB_SHADOW
    S_LINK
    S_LEAF
    S_HEAD
    S_LEVEL
    S_ROOT


@dataclass(frozen=True)
class Violation:
    """`invariant` ("I1", ...) does not hold: `what`, at entry `index` of pool page `page` (None: the whole), `gfn`."""

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


cdef inline bint _stopped(sc_mmu *mmu, u32 page) noexcept nogil:
    """Asked at every page: the handler of a signal has raised, and nobody wants to know the rest."""
    return page & 255 == 0 and mmu.watch != NULL and (
        mmu.watch.raised != NULL or (watch_due(mmu.watch) and watch_look(mmu.watch)))


cdef inline void _report(sc_audit *a, int invariant, int what, u32 page, u32 index, u64 gfn) noexcept nogil:
    cdef sc_finding *f
    if a.n < SC_MAX_FINDINGS:
        f = &a.found[a.n]
        f.invariant = invariant
        f.what = what
        f.page = page
        f.index = index
        f.gfn = gfn
    a.n += 1


cdef inline u64 _gpte(const sc_mmu *mmu, const sc_page *page, u32 index) noexcept nogil:
    """The guest entry from which entry `index` of a page that is not direct was made."""
    cdef u8 *table = mem_guest_frame(mmu.mem, page.gfn << 12)
    cdef u32 quadrant = role_field(page.role, ROLE_QUADRANT, 3)
    if table == NULL:
        return 0
    if role_pte_size(page.role) == 8:
        return (<u64 *>table)[index]
    if role_level(page.role) == 1:
        return (<u32 *>table)[(quadrant & 1) * 512 + index]
    return (<u32 *>table)[quadrant * 256 + index // 2]


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
        gpte = _gpte(mmu, page, index)
        if not gpte & PTE_P:
            _report(a, 1, S_ABSENT, number, index, page.gfn)
            return
        named = (gpte & (pte_addr() if role_pte_size(page.role) == 8 else 0xFFFFF000U)) >> 12
        allowed &= pte_rights(gpte)
        if granted & ACC_W and not gpte & PTE_D:
            _report(a, 1, S_CLEAN, number, index, page.gfn)
        pkey = pte_pkey(gpte)
    if named != gfn:
        _report(a, 1, S_FRAME, number, index, named)
    if role_field(page.role, ROLE_WP0, 1) or mmu.quirks & QUIRK_ROLE_WITHOUT_MODE:
        if not granted & ACC_U:
            allowed |= ACC_W
    if granted & ~allowed or (mode >= MODE_64 and pte_pkey(spte) != pkey and not (
            role_direct(page.role) and mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS)):
        _report(a, 1, S_RIGHTS, number, index, page.gfn)


cdef inline u64 _large_gfn(const sc_page *page, u64 gpte) noexcept nogil:
    """First frame of the large page that `gpte`, in the table behind `page`, maps."""
    if role_pte_size(page.role) == 8:
        return (gpte & pte_addr() & ~level_mask(role_level(page.role))) >> 12
    return ((gpte & 0xFFC00000U) | (((gpte >> 13) & 0xFF) << 32)) >> 12


cdef void _check_link(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, above the leaves: a present entry leads to the shadow of the table that its gpte names, or to a direct page
    where the gpte is a large page."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u32 target = mem_pool_page(mmu.table[number * 512 + index])
    cdef sc_page *child
    cdef u64 gpte, named
    cdef u32 granted, allowed
    cdef bint large
    if role_direct(page.role) or target >= mmu.pool_pages:
        return                      # the latter is a matter of I4
    child = &mmu.pages[target]
    gpte = _gpte(mmu, page, index)
    if not gpte & PTE_P:
        _report(a, 1, S_ABSENT, number, index, page.gfn)
        return
    if not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        granted = role_access(child.role)
        allowed = role_access(page.role) & pte_rights(gpte)
        if role_direct(child.role) and not gpte & PTE_D:
            allowed &= ~<u32>ACC_W
        if granted & ~allowed or (granted != allowed and not role_direct(child.role)):
            _report(a, 1, S_RIGHTS, number, index, page.gfn)
    large = gpte & PTE_PS and role_level(page.role) <= 3 and (
        role_pte_size(page.role) == 8 or role_field(page.role, ROLE_PSE, 1)
        or mmu.quirks & QUIRK_ROLE_WITHOUT_MODE != 0)
    if role_direct(child.role) or large:
        if not (role_direct(child.role) and large):
            _report(a, 1, S_TABLE, number, index, page.gfn)
        elif _large_gfn(page, gpte) != child.gfn:
            _report(a, 1, S_FRAME, number, index, _large_gfn(page, gpte))
        elif not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS and (
                role_field(child.role, ROLE_GLOBAL, 1) != (gpte & PTE_G != 0)
                or (role_field(page.role, ROLE_GLEVELS, 15) >= MODE_64
                    and role_field(child.role, ROLE_PKEY, 15) != pte_pkey(gpte))):
            _report(a, 1, S_RIGHTS, number, index, page.gfn)
        return
    named = (gpte & (pte_addr() if role_pte_size(page.role) == 8 else 0xFFFFF000U)) >> 12
    if named != child.gfn:
        _report(a, 1, S_TABLE, number, index, page.gfn)


cdef void check_mappings(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I1: each present spte says what the guest's tables say, with rights no wider (mappings)."""
    cdef u32 number, index
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        if not mmu.pages[number].active:
            continue
        for index in range(512):
            if mmu.table[number * 512 + index] & PTE_P:
                if role_level(mmu.pages[number].role) == 1:
                    _check_leaf(mmu, number, index, a)
                else:
                    _check_link(mmu, number, index, a)


cdef void check_write_protection(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I2: no writable spte maps a gfn that a shadow page, not direct, shadows."""
    cdef u32 number, index
    cdef u64 frame
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_level(mmu.pages[number].role) != 1:
            continue
        for index in range(512):
            if spte_is_writable(mmu.table[number * 512 + index]):
                frame = mem_leaf_frame(mmu.mem, mmu.table[number * 512 + index])
                if frame < mmu.mem.nframes and mmu.frames[frame].shadowed:
                    _report(a, 2, S_UNPROTECTED, number, index, mem_gfn(mmu.mem, frame))


cdef inline bint _listed(const sc_mmu *mmu, u32 head, u32 spte) noexcept nogil:
    """The list holds `spte`, with neighbours that agree."""
    cdef u32 prev, next_
    if not head & LIST_MANY:
        return head == spte + 1
    prev = mmu.links[spte].prev
    next_ = mmu.links[spte].next
    if prev > mmu.pool_pages * 512 or next_ > mmu.pool_pages * 512:
        return False
    if prev:
        if mmu.links[prev - 1].next != spte + 1:
            return False
    elif list_first(head) != spte + 1:
        return False
    return next_ == 0 or mmu.links[next_ - 1].prev == spte + 1


cdef inline bint _head_tells(const sc_mmu *mmu, u32 head) noexcept nogil:
    """LIST_MANY is set in heads of two members or more; the first is one that exists."""
    return not head & LIST_MANY or (list_first(head) and mmu.links[list_first(head) - 1].next)


cdef void check_rmap(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I3: the reverse map of a gfn lists exactly the writable leaves that map it, each once. Leaves map frames."""
    cdef u32 number, index, spte, member
    cdef u64 frame
    cdef u64 leaves = 0
    cdef u64 listed = 0
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_level(mmu.pages[number].role) != 1:
            continue
        for index in range(512):
            spte = number * 512 + index
            frame = mem_leaf_frame(mmu.mem, mmu.table[spte])
            if not spte_is_writable(mmu.table[spte]):
                if mmu.table[spte] & PTE_P and frame >= mmu.mem.nframes:
                    _report(a, 3, S_LEAF, number, index, mmu.pages[number].gfn)
                continue
            leaves += 1
            if frame < mmu.mem.nframes and not mmu.pages[number].slots >> mem_slot(
                    mmu.mem, mem_gfn(mmu.mem, frame)) & 1:
                _report(a, 3, S_SLOTS, number, index, mem_gfn(mmu.mem, frame))
            if frame >= mmu.mem.nframes or not _listed(mmu, mmu.frames[frame].rmap, spte):
                _report(a, 3, S_RMAP_MISSING, number, index, mem_gfn(mmu.mem, frame))
    for frame in range(mmu.mem.nframes):
        member = list_first(mmu.frames[frame].rmap)
        while member:
            if (member > mmu.pool_pages * 512 or not spte_is_writable(mmu.table[member - 1])
                    or mem_leaf_frame(mmu.mem, mmu.table[member - 1]) != frame or listed >= leaves):
                _report(a, 3, S_RMAP_FOREIGN, (member - 1) >> 9, (member - 1) & 511, mem_gfn(mmu.mem, frame))
                break
            listed += 1
            member = list_next(mmu, mmu.frames[frame].rmap, member)
        if member == 0 and not _head_tells(mmu, mmu.frames[frame].rmap):
            _report(a, 3, S_HEAD, SC_NONE, 0, mem_gfn(mmu.mem, frame))
    if listed != leaves:
        _report(a, 3, S_RMAP_MISSING, SC_NONE, 0, 0)


cdef void check_parents(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I4: parents and children agree, both ways."""
    cdef u32 number, index, spte, child, member
    cdef u64 links = 0
    cdef u64 listed = 0
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        if not mmu.pages[number].active or role_level(mmu.pages[number].role) == 1:
            continue
        for index in range(512):
            spte = number * 512 + index
            if not mmu.table[spte] & PTE_P:
                if mmu.table[spte]:
                    _report(a, 4, S_LINK, number, index, mmu.pages[number].gfn)
                continue
            links += 1
            child = mem_pool_page(mmu.table[spte])
            if (child >= mmu.pool_pages or not mmu.pages[child].active
                    or role_level(mmu.pages[child].role) != role_level(mmu.pages[number].role) - 1):
                _report(a, 4, S_CHILD, number, index, mmu.pages[number].gfn)
            elif (mmu.table[spte] & ~<u64>SPTE_MARK) | PTE_A != nonleaf_spte(child):
                _report(a, 4, S_LINK, number, index, mmu.pages[number].gfn)
            elif not _listed(mmu, mmu.pages[child].parents, spte):
                _report(a, 4, S_PARENT_MISSING, number, index, mmu.pages[child].gfn)
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        member = list_first(mmu.pages[number].parents)
        while member:
            if (member > mmu.pool_pages * 512 or not mmu.table[member - 1] & PTE_P
                    or mmu.table[member - 1] & pte_addr() != mem_pool_hpa(number) or listed >= links):
                _report(a, 4, S_PARENT_FOREIGN, number, 0, mmu.pages[number].gfn)
                break
            listed += 1
            member = list_next(mmu, mmu.pages[number].parents, member)
        if member == 0 and not _head_tells(mmu, mmu.pages[number].parents):
            _report(a, 4, S_HEAD, number, 0, mmu.pages[number].gfn)
    if listed != links:
        _report(a, 4, S_PARENT_MISSING, SC_NONE, 0, 0)


cdef u32 _lost_at(const sc_mmu *mmu, u32 first) noexcept nogil:
    """Where the hash chain from page `first` goes astray: a page that does not exist, or `first` if it never ends."""
    cdef u32 number = first
    for _ in range(mmu.pool_pages + 1):
        if number >= mmu.pool_pages:
            return number
        number = mmu.pages[number].hash_next
    return first


cdef void check_hash(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I5: the hash holds every active page once, in its bucket; no two pages have the same (gfn, role)."""
    cdef u64 bucket
    cdef u32 number, other, lost
    cdef u64 held = 0
    for bucket in range(<u64>1 << (64 - mmu.hash_shift)):
        lost = _lost_at(mmu, mmu.hash[bucket])
        if lost != SC_NONE:
            _report(a, 5, S_HASH, lost, 0, 0 if lost >= mmu.pool_pages else mmu.pages[lost].gfn)
            continue
        number = mmu.hash[bucket]
        while number != SC_NONE:
            if not mmu.pages[number].active or hash_bucket(mmu, mmu.pages[number].gfn) != bucket:
                _report(a, 5, S_HASH, number, 0, mmu.pages[number].gfn)
                break
            held += 1
            other = mmu.pages[number].hash_next
            while other != SC_NONE:
                if mmu.pages[other].gfn == mmu.pages[number].gfn and mmu.pages[other].role == mmu.pages[number].role:
                    _report(a, 5, S_TWICE, number, 0, mmu.pages[number].gfn)
                    break
                other = mmu.pages[other].hash_next
            number = mmu.pages[number].hash_next
    if held != mmu.n_active:
        _report(a, 5, S_HASH, SC_NONE, 0, 0)


cdef void check_pool(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I6: free pages are all zero; free + active = pool; what a page's header counts is what it holds."""
    cdef u32 number, index, used, previous
    cdef u32 active = 0
    cdef u32 listed = 0
    cdef u32 free = 0
    cdef bint marked, global_
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        active += mmu.pages[number].active
        if mmu.pages[number].active and not 1 <= role_level(mmu.pages[number].role) <= MODE_LA57:
            _report(a, 6, S_LEVEL, number, 0, mmu.pages[number].gfn)
        used = 0
        global_ = True
        for index in range(512):
            marked = (mmu.pages[number].used[index >> 6] >> (index & 63)) & 1
            if marked != (mmu.table[number * 512 + index] != 0):
                _report(a, 6, S_USED if mmu.pages[number].active else S_DIRTY_FREE, number, index,
                        mmu.pages[number].gfn)
                break
            used += marked
            global_ = global_ and (not marked or mmu.table[number * 512 + index] & PTE_G != 0)
        else:
            if not global_ and not mmu.pages[number].nonglobal and role_level(mmu.pages[number].role) == 1:
                _report(a, 6, S_NONGLOBAL, number, 0, mmu.pages[number].gfn)
            if used != mmu.pages[number].present or (used and not mmu.pages[number].active):
                _report(a, 6, S_USED if mmu.pages[number].active else S_DIRTY_FREE, number, 0, mmu.pages[number].gfn)
    number = mmu.young
    previous = SC_NONE
    while number < mmu.pool_pages and listed <= mmu.pool_pages:
        listed += 1
        if mmu.pages[number].prev != previous or mmu.pages[number].active != 1:
            _report(a, 6, S_LIST, number, 0, mmu.pages[number].gfn)
        previous = number
        number = mmu.pages[number].next
    if previous != mmu.old or number != SC_NONE:
        _report(a, 6, S_LIST, mmu.old, 0, 0)
    number = mmu.free_head
    while number < mmu.pool_pages and not mmu.pages[number].active and free <= mmu.pool_pages:
        free += 1
        number = mmu.pages[number].next
    if (number != SC_NONE or active != mmu.n_active or listed != active or free != mmu.n_free
            or free + active != mmu.pool_pages):
        _report(a, 6, S_SUM, SC_NONE, 0, 0)


cdef void check_shadowed(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I6, per frame: the count of shadow pages by which a frame is known to be a guest table is right.

    They are counted by the hash, which has to be sound (I5)."""
    cdef u32 number, other
    cdef u64 frame
    cdef u64 pages = 0
    cdef u64 counted = 0
    cdef u32 same
    cdef u32 formats[2]
    formats[0] = formats[1] = 0
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
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
            same += mmu.pages[other].gfn == mmu.pages[number].gfn and not role_direct(mmu.pages[other].role)
            other = mmu.pages[other].hash_next
        if same != mmu.frames[frame].shadowed:
            _report(a, 6, S_SHADOWED, number, 0, mmu.pages[number].gfn)
    for frame in range(mmu.mem.nframes):
        counted += mmu.frames[frame].shadowed
    if counted != pages:
        _report(a, 6, S_SHADOWED, SC_NONE, 0, 0)
    if formats[0] != mmu.n_pte4 or formats[1] != mmu.n_pte8:
        _report(a, 6, S_FORMATS, SC_NONE, 0, 0)


cdef void check_roots(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I7: root counts equal the roots that vcpus hold, and the processor walks from those; a root is active, and the
    page that its vcpu's registers ask for."""
    cdef u32 number, i, slot, held
    cdef const sc_vcpu *v
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        held = 0
        for i in range(mmu.n_vcpus):
            for slot in range(4):
                held += mmu.vcpus[i].roots[slot] == number
        if held != mmu.pages[number].root_count or (held and not mmu.pages[number].active):
            _report(a, 7, S_ROOTS, number, 0, mmu.pages[number].gfn)
    for i in range(mmu.n_vcpus):
        v = mmu.vcpus[i]
        for slot in range(4):
            if v.roots[slot] == SC_NONE:
                if v.hw.pdpte[slot] & PTE_P:
                    _report(a, 7, S_HW_ROOT, SC_NONE, slot, 0)
                continue
            if v.hw.pdpte[slot] != (mem_pool_hpa(v.roots[slot]) | PTE_P) or v.roots[slot] >= mmu.pool_pages:
                _report(a, 7, S_HW_ROOT, v.roots[slot], slot, 0)
                continue
            if not root_fits(mmu, v, slot, v.roots[slot]):
                _report(a, 7, S_ROOT, v.roots[slot], slot, mmu.pages[v.roots[slot]].gfn)
        if v.guest.mode >= MODE_64 and v.hw.root != (0 if v.roots[0] == SC_NONE else mem_pool_hpa(v.roots[0])):
            _report(a, 7, S_HW_ROOT, v.roots[0], 0, 0)


cdef void check_counters(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I9: counters agree: page-fault exits = sum of their reasons, present sptes = installed - removed."""
    cdef u32 number, index
    cdef u64 reasons = 0
    cdef u64 present = 0
    for index in range(EXIT_FAULTS):
        reasons += mmu.stats.exits[index]
    if reasons != mmu.stats.pf_taken:
        _report(a, 9, S_EXITS, SC_NONE, 0, 0)
    for number in range(mmu.pool_pages):
        if _stopped(mmu, number):
            return
        if mmu.pages[number].active:
            for index in range(512):
                present += mmu.table[number * 512 + index] & PTE_P
    a.sptes = present
    if mmu.spte_base + mmu.stats.spte_installed - mmu.stats.spte_removed != present:
        _report(a, 9, S_SPTES, SC_NONE, 0, 0)


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
        if level == 1:
            return (frame != sc_no_frame() and value & pte_addr() == mem_frame_hpa(mmu.mem, frame)
                    and not e.access & ~pte_rights(value) & ACC_W)
        page = mem_pool_page(value)
        level -= 1
    return False


cdef void check_tlb(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I8: no TLB entry grants more than the guest's tables did at some moment since the last flush that covers it: it
    was filled after that flush. Under a shadow MMU the shadow still leads where it leads: what is withdrawn there is
    flushed. And none lets a store pass that the shadow MMU has to see."""
    cdef u32 i, n
    cdef int size
    cdef const sc_tlb *t
    cdef const sc_tlb_entry *e
    cdef u64 frame
    for i in range(mmu.n_vcpus):
        t = mmu.vcpus[i].tlb
        if t == NULL:
            continue
        for size in range(TLB_SIZES):
            for n in range(t.sets[size] * t.ways[size]):
                e = &t.entry[size][n]
                if not tlb_valid(t, e, mmu.flush_epoch):
                    continue
                if tlb_overdue(t, e):
                    _report(a, 8, S_TLB_STALE, SC_NONE, n, e.page >> 12)
                if not mmu.shadow:
                    continue
                if not _in_shadow(mmu, e):
                    _report(a, 8, S_TLB_SHADOW, SC_NONE, n, e.page >> 12)
                if not (e.access & ACC_W and e.dirty):
                    continue
                frame = mem_frame(mmu.mem, e.gpa >> 12)
                if frame == sc_no_frame():
                    continue
                if mmu.frames[frame].shadowed:
                    _report(a, 8, S_TLB_TABLE, SC_NONE, n, e.gpa >> 12)
                if mem_unlogged(mmu.mem, e.gpa >> 12):
                    _report(a, 8, S_TLB_LOG, SC_NONE, n, e.gpa >> 12)


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
    if which >> 3 & 1:
        check_rmap(mmu, a)
    if which >> 7 & 1:
        check_roots(mmu, a)
    if which >> 1 & 1:
        check_mappings(mmu, a)
    if which >> 2 & 1:
        check_write_protection(mmu, a)


cdef int mmu_settle(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """The VM is to be used, and mem.busy is not 0. RC_OK, and it is 0, if the only reason was that the shadow structure
    was written by hand, nobody can write to it any more, and I3 to I7 hold. Else RC_AUDIT; a.n is not 0 if they do
    not."""
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
