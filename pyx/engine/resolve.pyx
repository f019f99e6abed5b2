"""Where an access leads: by the TLB, by a walk, and by the faults that a walk of the shadow takes."""
from shadowcore.engine.absent cimport is_marker, marker_stays
from shadowcore.engine.bits cimport CR4_PGE, PTE_D, PTE_G, PTE_P, PTE_W, level_index
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.design cimport design_enter
from shadowcore.engine.fault cimport page_fault
from shadowcore.engine.hooks cimport POINT_POST_FAULT, POINT_PRE_FAULT, audit_point
from shadowcore.engine.invalidate cimport deliver_fault, inject_fault
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_gfn, mem_is_device, mem_touch
from shadowcore.engine.nested.tables cimport host_tables_of_walk
from shadowcore.engine.references cimport walk_ended
from shadowcore.engine.roots cimport root_slots
from shadowcore.engine.state cimport sc_mmu, sc_vcpu, vcpu_pcid, walk_mark
from shadowcore.engine.tlb cimport (
    TLB_FETCH, TLB_LOAD, TLB_STORE, tlb_flush_caches, tlb_flush_fault, tlb_violated, tlb_walked,
)
from shadowcore.engine.tlbhit cimport tlb_hit, tlb_kind
from shadowcore.engine.types cimport (
    MODE_32, MODE_OFF, PF_P, PF_W, RC_EMULATE, RC_EXHAUSTED, RC_LIVELOCK, RC_MMIO, RC_OK, RC_PF, RC_RETRY,
    SC_NONE, npf_table, u32, u64,
)
from shadowcore.engine.walker cimport guest_walk, nested_walk, probe_walk, sc_walk, shadow_walk

cdef enum:
    MAX_EXITS = 40                  # exits of one access after which it is taken to hang


# Counters by kind of access follow each other, in the order of TLB_LOAD, TLB_STORE, TLB_FETCH.
sc_check(TLB_LOAD >> 1 == 0)
sc_check(TLB_STORE >> 1 == 1)
sc_check(TLB_FETCH >> 1 == 2)


cdef inline void _missed(sc_mmu *mmu, u32 kind) noexcept nogil:
    mmu.stats.tlb_misses += 1
    (&mmu.stats.tlb_load_misses)[kind >> 1] += 1


cdef inline void _ended(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w, bint complete) noexcept nogil:
    """A walk has ended, while no fast path is open: caches may spare it entries, somebody may want to know of them."""
    if mmu.walks != NULL or (complete and v.tlb != NULL and v.tlb.caching):
        walk_ended(mmu, v, va, access, w, complete)


cdef inline bint _tlb_hit(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    if not tlb_hit(mmu, v, va, access, &w.gpa):
        _missed(mmu, tlb_kind(access))
        return False
    w.error_code = 0
    return True


cdef inline int _guest_shift(const sc_mmu *mmu, const sc_vcpu *v, const sc_walk *w) noexcept nogil:
    """log2 of the guest's page size, from a walk of the shadow."""
    cdef int level
    if v.guest.mode == MODE_OFF:
        return 12
    level = mmu.design.guest_level(mmu, w)
    return 12 if level == 1 else 22 if v.guest.mode == MODE_32 else 12 + 9 * (level - 1)


cdef inline void _tlb_fill(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w, int shift,
                           int guest) noexcept nogil:
    cdef u64 leaf = w.entry[w.level]
    cdef u32 root = SC_NONE
    if mmu.shadow:
        root = v.roots[0 if root_slots(v) == 1 else <int>(va >> 30) & 3]
    tlb_walked(v.tlb, va, w.gpa, shift, guest, vcpu_pcid(v), w.access, w.pkey, leaf & PTE_D != 0,
               leaf & PTE_G != 0 and v.cr4 & CR4_PGE != 0, mmu.flush_epoch, root, tlb_kind(access))


cdef bint _delivered(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """The processor's walk failed at a marker, and the guest's tables say the same still: the fault is delivered, with
    the code in w, without an exit. A marker that lags is no reason for one, and goes."""
    if hw.level != 1 or not is_marker(hw.entry[1]):
        return False
    if probe_walk(mmu.mem, &v.guest, va, access, w) == RC_OK or w.error_code & PF_P:
        marker_stays(mmu, <u32>(hw.table[1] - SC_POOL_HFN) * 512 + level_index(va, 1), PTE_P)
        return False
    deliver_fault(mmu, v, va)
    mmu.stats.marker_hits += 1
    return True


cdef void _tlb_fill_nested(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w) noexcept nogil:
    """What the TLB keeps of a walk in two dimensions: a page as large as the smaller of both is, and D only where the
    host's leaf lets stores pass."""
    cdef u64 leaf = w.entry[w.level]
    cdef int guest = 12 + (10 if v.guest.mode == MODE_32 else 9) * (w.level - 1)
    tlb_walked(v.tlb, va, w.gpa, min(guest, 12 + 9 * (w.host_level - 1)), guest, vcpu_pcid(v), w.access, w.pkey,
               leaf & PTE_D and w.host_entry & PTE_W, leaf & PTE_G != 0 and v.cr4 & CR4_PGE != 0, mmu.flush_epoch,
               SC_NONE, tlb_kind(access))


cdef void _violated(sc_vcpu *v, u64 va, const sc_walk *w) noexcept nogil:
    """The host's tables refused w.refused_gpa: what was cached of them for it goes and, if it is what `va` leads to,
    what was cached for that (SDM vol. 3, 28.3.3.1)."""
    tlb_violated(v.tlb, w.refused_gpa)
    if not w.refused_code & npf_table():
        tlb_flush_fault(v.tlb, va, vcpu_pcid(v), False)
        tlb_flush_caches(v.tlb, va, vcpu_pcid(v), False)


cdef int _resolve_nested(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """resolve, where the host's tables translate each address of the walk."""
    cdef int rc
    cdef int exits = 0
    while exits < MAX_EXITS:
        design_enter(mmu, v)
        rc = nested_walk(mmu.mem, &v.guest, va, access, w)
        mmu.stats.walk_references += w.references
        if v.memo == NULL:
            _ended(mmu, v, va, access, w, rc == RC_OK)
        if rc == RC_OK:
            if v.tlb != NULL and v.guest.mode != MODE_OFF:
                _tlb_fill_nested(mmu, v, va, access, w)
            return RC_OK
        if rc == RC_PF:
            inject_fault(mmu, v, va, w.error_code)
            return RC_PF
        if v.tlb != NULL:
            _violated(v, va, w)
        audit_point(mmu, POINT_PRE_FAULT)
        rc = mmu.design.host_fault(mmu, v, va, access, w)
        audit_point(mmu, POINT_POST_FAULT)
        if rc != RC_RETRY or v.restarts:
            return RC_RETRY if rc == RC_OK and v.restarts else rc
        exits += 1
    # A walk needs the host's tables of all its tables at once.
    if mmu.pool_pages < (0 if mmu.tdp else mmu.refill) + host_tables_of_walk(mmu, v):
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    return RC_LIVELOCK


cdef int resolve(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """Translate `va` for `access` (PF_W, PF_U, PF_I) with all exits and side effects; w.gpa is where it leads.

    RC_OK: RAM, to be accessed directly. RC_EMULATE: RAM, the store must go through emulate_store. RC_MMIO: no RAM.
    RC_PF: w.error_code, CR2 is set. Negative: a host-side error.
    """
    cdef sc_walk hw
    cdef int rc, shift
    cdef int exits = 0
    mmu.stats.accesses += 1
    if v.tlb != NULL and _tlb_hit(mmu, v, va, access, w):
        return RC_OK
    if not mmu.shadow:
        if mmu.nested:
            return _resolve_nested(mmu, v, va, access, w)
        rc = guest_walk(mmu.mem, &v.guest, va, access, w)
        mmu.stats.walk_references += w.references
        if v.memo == NULL:
            _ended(mmu, v, va, access, w, rc == RC_OK and not mem_is_device(mmu.mem, w.gpa >> 12, access))
        if rc == RC_PF:
            inject_fault(mmu, v, va, w.error_code)
        elif mem_is_device(mmu.mem, w.gpa >> 12, access):
            rc = RC_MMIO
        else:
            mem_touch(mmu.mem, w.gpa >> 12, access & PF_W != 0)
            if v.tlb != NULL and v.guest.mode != MODE_OFF:
                shift = 12 + (10 if v.guest.mode == MODE_32 else 9) * (w.level - 1)
                _tlb_fill(mmu, v, va, access, w, shift, shift)
        return rc
    while exits < MAX_EXITS:
        design_enter(mmu, v)
        rc = shadow_walk(mmu.mem, &v.hw, va, access, &hw)
        mmu.stats.walk_references += hw.references
        if v.memo == NULL:
            _ended(mmu, v, va, access, &hw, rc == RC_OK)
        if rc == RC_OK:
            w.gpa = (mem_gfn(mmu.mem, (hw.gpa >> 12) - mmu.mem.ram_hfn) << 12) | (va & 4095)
            if v.tlb != NULL:
                hw.gpa = w.gpa
                _tlb_fill(mmu, v, va, access, &hw, 12, _guest_shift(mmu, v, &hw))
            if mmu.policy.walked != NULL:
                mmu.policy.walked(mmu, v, va)
            return RC_OK
        if mmu.absent and _delivered(mmu, v, va, access, &hw, w):
            return RC_PF
        rc = page_fault(mmu, v, access, &hw, w)
        if mmu.policy.walked != NULL and (rc == RC_OK or rc == RC_EMULATE):
            mmu.policy.walked(mmu, v, va)       # the walk that is not made any more
        if rc != RC_RETRY or v.restarts:
            # A walk that went on below a mark was no exit.
            return RC_RETRY if rc == RC_OK and v.restarts and walk_mark(mmu, &hw) == SC_NONE else rc
        exits += 1
    return RC_LIVELOCK
