"""The invariants of the MMU, a checker each; and what checkers have in common."""
from shadowcore.engine.memory cimport mem_guest_frame
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.rmap cimport LIST_MANY, list_first
from shadowcore.engine.role cimport ROLE_QUADRANT, role_field, role_level, role_pte_size
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u8, u32, u64
from shadowcore.engine.watch cimport watch_due, watch_look

cdef enum:
    SC_MAX_FINDINGS = 64

cdef struct sc_finding:
    int invariant                   # 1 for I1, ...
    int what                        # index of the sentence in invariants.SENTENCES
    u32 page                        # pool page, or SC_NONE
    u32 index                       # entry in the page, or 0
    u64 gfn                         # guest frame concerned

cdef struct sc_audit:
    sc_finding found[SC_MAX_FINDINGS]
    u32 n                           # violations, of which the first SC_MAX_FINDINGS are kept
    u64 sptes                       # present sptes looked at

# What a finding says: the order of invariants.SENTENCES.
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
    S_DEVICE
    S_LEAF_MISSING
    S_LEAF_FOREIGN
    S_MAPPED
    S_GAUGE
    S_NO_LARGE
    S_DYING
    S_UNSYNC
    S_MARK_MISSING
    S_MARKS
    S_PREVIOUS
    S_LAGS
    S_HOST_ABSENT
    S_HOST_READ_ONLY
    S_MARKER
    S_BOOKS
    S_NESTED
    S_HOST_TABLE
    S_NESTED_COUNT
    S_COUNT

cdef void audit_all(sc_mmu *mmu, sc_audit *a) noexcept nogil
cdef int mmu_settle(sc_mmu *mmu, sc_audit *a) noexcept nogil
cdef tuple audit_violations(const sc_audit *a)
cdef bint audit_protected(const sc_mmu *mmu, u64 frame) noexcept nogil
cdef void audit_marker(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil

# Of checkers. Whatever is in the arrays, they stay within them and end.

cdef inline u64 entry_gpte(const sc_mmu *mmu, const sc_page *page, u32 index) noexcept nogil:
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

cdef inline bint audit_stopped(sc_mmu *mmu, u32 page) noexcept nogil:
    """Asked at every page: the handler of a signal has raised, and nobody wants to know the rest."""
    return page & 255 == 0 and mmu.watch != NULL and (
        mmu.watch.raised != NULL or (watch_due(mmu.watch) and watch_look(mmu.watch)))

cdef inline void audit_report(sc_audit *a, int invariant, int what, u32 page, u32 index, u64 gfn) noexcept nogil:
    cdef sc_finding *f
    if a.n < SC_MAX_FINDINGS:
        f = &a.found[a.n]
        f.invariant = invariant
        f.what = what
        f.page = page
        f.index = index
        f.gfn = gfn
    a.n += 1

cdef inline bint audit_listed(const sc_mmu *mmu, u32 head, u32 spte) noexcept nogil:
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

cdef inline bint audit_head_tells(const sc_mmu *mmu, u32 head) noexcept nogil:
    """LIST_MANY is set in heads of two members or more; the first is one that exists."""
    return not head & LIST_MANY or (list_first(head) and mmu.links[list_first(head) - 1].next)
