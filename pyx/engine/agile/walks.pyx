"""Walks that begin in the shadow's tables and go on, below a mark, in the guest's own, whose addresses the host's
tables translate; and the exits at which marks come to be on the way.

The processor reads the guest's tables as loads and sets A and D in them as stores, so that D of a host's entry tells
that somebody stored to a table. (EPT with accessed and dirty bits takes every read of a guest's table for a store.)
What guests see is what a walk of their tables gives at this moment: of tables below marks nothing is kept but in TLBs.
"""
from shadowcore.engine.agile.rule cimport interval_goes_on, table_is_nested, table_mark
from shadowcore.engine.agile.tables cimport host_fault, host_tables_in_place
from shadowcore.engine.bits cimport CR4_PGE, PTE_A, PTE_D, PTE_G, PTE_W, level_index, pte_nx
from shadowcore.engine.counters cimport EXIT_FILL, EXIT_GUEST
from shadowcore.engine.design cimport design_make_room
from shadowcore.engine.emulate cimport walk_updated
from shadowcore.engine.flushes cimport FLUSH_LINK, exit_flush, request_flush
from shadowcore.engine.gmode cimport PROBE, TABLES_GUEST, WALK, in_mode, sc_gmode
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.invalidate cimport inject_fault
from shadowcore.engine.memory cimport mem_frame, mem_is_rom, mem_pool_page, sc_mem, sc_no_frame
from shadowcore.engine.references cimport walk_went_on
from shadowcore.engine.role cimport role_access, role_level
from shadowcore.engine.roots cimport make_role, root_load
from shadowcore.engine.spte cimport spte_drop, spte_link
from shadowcore.engine.state cimport sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport (
    TLB_FETCH, TLB_LOAD, TLB_STORE, tlb_flush_caches, tlb_flush_fault, tlb_violated, tlb_walked,
)
from shadowcore.engine.types cimport (
    ACC_U, ACC_W, ACC_X, MODE_32, MODE_64, MODE_OFF, PF_I, PF_W, RC_EXHAUSTED, RC_OK, RC_PF, RC_RETRY, SC_NONE,
    npf_final, npf_table, u32, u64,
)
from shadowcore.engine.walker cimport (
    STEP_FAULT, STEP_LEAF, guest_walk, host_walk, probe_walk, sc_paging, sc_walk, walk_above, walk_end, walk_index,
    walk_step, walk_stopped,
)


cdef struct sc_below:
    sc_mem *m
    const sc_paging *p
    u64 va
    u32 access
    u32 above                       # ACC_* that the levels above allow
    u64 base                        # gpa of the table at which the walk goes on
    int level                       # ... and its level
    sc_walk *w


cdef inline u64 _below_in(void *asked, sc_gmode g) noexcept nogil:
    cdef const sc_below *a = <const sc_below *>asked
    cdef u64 base = a.base
    cdef u64 entry = 0
    cdef u64 all_ = ~<u64>0
    cdef u32 references = 0         # counted by the caller, who translates each table's address
    cdef int level = a.level
    cdef int step
    if not a.above & ACC_W:
        all_ &= ~<u64>PTE_W
    if not a.above & ACC_U:
        all_ &= ~<u64>ACC_U         # the bit of an entry
    if not a.above & ACC_X:
        all_ &= ~pte_nx()           # inverted there
    g.top = level
    a.w.va = a.va
    a.w.top = level
    a.w.pte_size = g.pte_size
    a.w.references = 0
    a.w.updated = 0
    a.w.dirtied = False
    while True:
        step = walk_step(a.m, a.p, a.va, a.access, a.w, &base, &entry, &all_, &references, level, g)
        if step == STEP_LEAF:
            return walk_end(a.m, a.p, a.va, a.access, a.w, &a.w.gpa, &references, entry, all_, level, g)
        if step == STEP_FAULT:
            return walk_stopped(a.w, level, g)
        level -= 1


cdef inline bint _sets(const sc_mmu *mmu, const sc_walk *w, int level, u32 access) noexcept nogil:
    """The end of a complete walk sets A or D in the entry of `level`."""
    cdef u64 missing = ~w.entry[level] & (PTE_A | (PTE_D if level == w.level and access & PF_W else 0))
    return missing and not mem_is_rom(mmu.mem, w.table[level])


cdef int _refused(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """The host's tables refused a step of the walk: an exit."""
    mmu.stats.walk_references += w.references
    if v.memo == NULL:
        walk_went_on(mmu, v, hw.va, access, hw, w, False)
    if v.tlb != NULL:               # SDM vol. 3, 28.3.3.1
        tlb_violated(v.tlb, w.refused_gpa)
        if not w.refused_code & npf_table():
            tlb_flush_fault(v.tlb, hw.va, vcpu_pcid(v), False)
            tlb_flush_caches(v.tlb, hw.va, vcpu_pcid(v), False)
    return host_fault(mmu, v, hw.va, access, hw, w)


cdef inline void _tlb_fill(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w) noexcept nogil:
    """What the TLB keeps of such a walk: a page of 4 KiB, as the host's leaves are, and D only where nothing is left to
    be set by a store: in the guest's leaf, and in the host's."""
    cdef u64 leaf = w.entry[w.level]
    cdef int guest = 12 + (10 if v.guest.mode == MODE_32 else 9) * (w.level - 1)
    tlb_walked(v.tlb, va, w.gpa, 12, guest, vcpu_pcid(v), w.access, w.pkey,
               leaf & PTE_D and ~w.host_entry & (PTE_W | PTE_D) == 0, leaf & PTE_G != 0 and v.cr4 & CR4_PGE != 0,
               mmu.flush_epoch, SC_NONE, TLB_FETCH if access & PF_I else TLB_STORE if access & PF_W else TLB_LOAD)


cdef int _no_table(sc_mmu *mmu, sc_vcpu *v, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """A guest's entry names a table where there is no memory: an exit, after which the guest gets its fault."""
    exit_flush(mmu)
    mmu.stats.pf_taken += 1
    mmu.stats.npf_violation += 1
    inject_fault(mmu, v, hw.va, w.error_code)
    count_exit(mmu, v.number, EXIT_GUEST, hw.va)
    return RC_PF


cdef int walk_on(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w, u32 page) noexcept nogil:
    """The walk hw of the shadow came to `page`, which stands for a guest table. RC_OK: it leads to w.gpa, without an
    exit. RC_PF: the guest's own fault, without one, w.error_code. Else there was one: see host_fault."""
    cdef sc_below below
    cdef int level, rc
    cdef bint sets = False
    mmu.stats.walk_references -= 1  # the mark above said all: there is nothing to read in the page
    mmu.stats.nested_walks += 1
    host_tables_in_place(mmu, v)
    below.m = mmu.mem
    below.p = &v.guest
    below.va = hw.va
    below.access = access
    below.above = role_access(mmu.pages[page].role)
    below.base = mmu.pages[page].gfn << 12
    below.level = role_level(mmu.pages[page].role)
    below.w = w
    rc = <int>in_mode(v.guest.mode, TABLES_GUEST, PROBE, _below_in, &below)
    w.references = 0
    w.refused_code = 0
    for level in range(below.level, w.level - 1, -1):
        if mem_frame(mmu.mem, w.table[level]) == sc_no_frame():
            mmu.stats.walk_references += w.references
            if v.memo == NULL:
                walk_went_on(mmu, v, hw.va, access, hw, w, False)
            return _no_table(mmu, v, hw, w)
        if rc == RC_OK and _sets(mmu, w, level, access):
            sets = True
        if host_walk(mmu.mem, &v.guest, (w.table[level] << 12) + walk_index(w, level) * w.pte_size,
                     PF_W if rc == RC_OK and _sets(mmu, w, level, access) else 0, npf_table(), w) != RC_OK:
            return _refused(mmu, v, access, hw, w)
        w.references += 1
    if rc != RC_OK:
        mmu.stats.walk_references += w.references
        if v.memo == NULL:
            walk_went_on(mmu, v, hw.va, access, hw, w, False)
        inject_fault(mmu, v, hw.va, w.error_code)
        interval_goes_on(mmu)
        return RC_PF
    if sets:
        level = w.references
        in_mode(v.guest.mode, TABLES_GUEST, WALK, _below_in, &below)
        w.references = level
    if host_walk(mmu.mem, &v.guest, w.gpa, access & (PF_W | PF_I), npf_final(), w) != RC_OK:
        return _refused(mmu, v, access, hw, w)
    mmu.stats.walk_references += w.references
    if v.memo == NULL:
        walk_went_on(mmu, v, hw.va, access, hw, w, True)
    if v.tlb != NULL:
        _tlb_fill(mmu, v, hw.va, access, w)
    interval_goes_on(mmu)
    return RC_OK


cdef int _marked_level(const sc_mmu *mmu, const sc_walk *w) noexcept nogil:
    """The highest level at which the complete walk w of the guest's tables comes to one that the processor walks, or 0.
    Tables that serve as roots are none."""
    cdef int level
    for level in range(w.top - 1, w.level - 1, -1):
        if table_is_nested(mmu, w.table[level]):
            return level
    return 0


cdef int _link(sc_mmu *mmu, sc_vcpu *v, u64 va, const sc_walk *w, int marked) noexcept nogil:
    """Link the levels down to the mark."""
    cdef int level = v.guest.mode if v.guest.mode >= MODE_64 else 2
    cdef int slot = 0 if level > 2 else <int>(va >> 30) & 3
    cdef u32 page = v.roots[slot]
    cdef u32 spte, child, linked
    if page == SC_NONE:
        page = root_load(mmu, v, slot)
    while page != SC_NONE and level > marked:
        spte = page * 512 + level_index(va, level)
        linked = mem_pool_page(mmu.table[spte]) if mmu.table[spte] else SC_NONE
        child = linked
        if level - 1 == marked:
            child = table_mark(mmu, w.table[marked], make_role(mmu, v, va, marked, False, walk_above(w, marked)))
        elif linked == SC_NONE:
            child = mmu.design.child(mmu, v, va, level - 1, w, linked)
        if child != linked and child != SC_NONE:
            if linked != SC_NONE:
                spte_drop(mmu, spte)
                request_flush(mmu, FLUSH_LINK)
            spte_link(mmu, spte, child)
        page = child
        level -= 1
    return RC_EXHAUSTED if page == SC_NONE else RC_OK


cdef int mark_path(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """A page-fault exit at which the way is linked down to a mark, if the guest's tables allow the access and one of
    them is the processor's: RC_RETRY. RC_OK: it is another kind of exit, and nothing has changed."""
    cdef u64 va = hw.va
    cdef int marked
    if v.guest.mode == MODE_OFF or probe_walk(mmu.mem, &v.guest, va, access, w) != RC_OK or not _marked_level(mmu, w):
        return RC_OK
    if not design_make_room(mmu, v, va):
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    marked = _marked_level(mmu, w)
    if not marked:
        return RC_OK                # it was recycled
    guest_walk(mmu.mem, &v.guest, va, access, w)
    if w.updated:
        walk_updated(mmu, v, w)
    if _link(mmu, v, va, w, marked) != RC_OK:
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    exit_flush(mmu)
    mmu.stats.pf_taken += 1
    mmu.stats.pf_fixed += 1
    mmu.stats.guest_walk_references += w.references
    if mmu.flood_reset:
        v.flood_count = 0
    count_exit(mmu, v.number, EXIT_FILL, va)
    return RC_RETRY
