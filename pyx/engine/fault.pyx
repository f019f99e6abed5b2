"""The page-fault entry: what an exit becomes."""
from shadowcore.engine.bits cimport PTE_A, PTE_D, pte_pkey, pte_rights
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_GUEST, EXIT_MMIO, EXIT_WRITE
from shadowcore.engine.design cimport design_make_room
from shadowcore.engine.emulate cimport walk_updated
from shadowcore.engine.fetch cimport fetch, sc_leaf
from shadowcore.engine.flushes cimport exit_flush
from shadowcore.engine.hooks cimport POINT_POST_FAULT, POINT_PRE_FAULT, audit_point, count_exit
from shadowcore.engine.invalidate cimport invalidate_fault
from shadowcore.engine.memory cimport mem_frame, sc_no_frame
from shadowcore.engine.quirks cimport QUIRK_PROCESSOR_CODE, QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_TWO_EXITS
from shadowcore.engine.roots cimport release_everything
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_U, MODE_OFF, MODE_PAE, PF_P, PF_RSVD, PF_W, RC_EMULATE, RC_EXHAUSTED, RC_MMIO, RC_OK, RC_PF, RC_RETRY, u32, u64,
)
from shadowcore.engine.walker cimport access_code, guest_walk, rights_fault, sc_walk


cdef inline int _inject(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code, sc_walk *w) noexcept nogil:
    v.cr2 = va
    w.error_code = code
    mmu.stats.pf_guest += 1
    invalidate_fault(mmu, v, va)
    count_exit(mmu, v.number, EXIT_GUEST, va)
    if mmu.flood_reset:
        v.flood_count = 0
    return RC_PF


cdef int _fetch_with_room(sc_mmu *mmu, sc_vcpu *v, u32 access, bint refused, const sc_walk *hw, sc_walk *w,
                          sc_leaf *leaf) noexcept nogil:
    """fetch, and once more with all the room there can be."""
    if fetch(mmu, v, access, refused, hw, w, leaf) == RC_OK:
        return RC_OK
    release_everything(mmu, v, w.va)
    return fetch(mmu, v, access, refused, NULL, w, leaf)


cdef inline int _repeated(sc_mmu *mmu, const sc_vcpu *v, u32 access, u32 spte) noexcept nogil:
    """The processor walks again. Where that walk is known to succeed, by the path just linked to the leaf `spte`, what
    it would count and set is done here: RC_OK. It is made where a TLB is modelled, which it fills, and where a leaf
    may be kept that leads elsewhere than the guest's tables (quirk ROLE_WITHOUT_ACCESS)."""
    if v.tlb != NULL or mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        return RC_RETRY
    mmu.stats.walk_references += 2 if v.hw.mode == MODE_PAE else v.hw.mode
    mmu.table[spte] |= PTE_A | (PTE_D if access & PF_W else 0)
    return RC_OK


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    cdef u64 va = hw.va
    cdef u32 code = hw.error_code
    cdef u64 epoch = mmu.memo_epoch
    cdef sc_leaf leaf
    cdef u32 fault
    cdef bint refused = False
    cdef bint device
    cdef u32 looks
    cdef u64 spte
    mmu.stats.pf_taken += 1
    exit_flush(mmu)
    if not design_make_room(mmu, v, va):
        mmu.stats.pf_taken -= 1
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    if guest_walk(mmu.mem, &v.guest, va, access, w) == RC_PF:
        refused = True
    mmu.stats.guest_walk_references += w.references
    if w.updated:
        walk_updated(mmu, v, w)
    if refused:
        # A rights violation, met at the end of a complete walk, is noticed by the series only when a leaf is there
        # and nothing about it can be mended: for a load from a user page, that the leaf is not (CR0.WP = 0). With
        # ROLE_WITHOUT_ACCESS it is judged by that leaf.
        looks = QUIRK_TWO_EXITS
        if code & PF_P:
            looks = QUIRK_ROLE_WITHOUT_ACCESS | (0 if access & PF_W or not w.access & ACC_U else QUIRK_TWO_EXITS)
        if w.error_code & (PF_P | PF_RSVD) != PF_P or not mmu.quirks & looks:
            return _inject(mmu, v, va, code if mmu.quirks & QUIRK_PROCESSOR_CODE else w.error_code, w)
    device = mem_frame(mmu.mem, w.gpa >> 12) == sc_no_frame()
    if device and v.guest.mode == MODE_OFF:
        mmu.stats.pf_mmio += 1
        count_exit(mmu, v.number, EXIT_MMIO, va)
        return RC_MMIO
    # The failed walk knows the path to the leaf, if it came that far and nothing was withdrawn since.
    if _fetch_with_room(mmu, v, access, refused, hw if mmu.memo_epoch == epoch else NULL, w, &leaf) != RC_OK:
        mmu.stats.pf_taken -= 1
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    if not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        leaf.refused = refused
    if ((leaf.refused and ((code & PF_P and not leaf.changed) or not mmu.quirks & QUIRK_TWO_EXITS))
            or (device and (refused or leaf.refused))):
        return _inject(mmu, v, va, access_code(&v.guest, access) | PF_P, w)
    if mmu.quirks & QUIRK_PROCESSOR_CODE and code & PF_P and leaf.plain and not device and v.guest.mode != MODE_OFF:
        return _inject(mmu, v, va, code, w)
    if device:
        mmu.stats.pf_mmio += 1
        count_exit(mmu, v.number, EXIT_MMIO, va)
        return RC_MMIO
    if v.guest.mode != MODE_OFF:
        mmu.stats.pf_fixed += 1
    spte = mmu.table[leaf.spte]
    fault = rights_fault(&v.hw, pte_rights(spte), pte_pkey(spte), access)
    if leaf.emulate or (fault and not refused and not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS):
        # The second case: what the guest allows no leaf can grant under the registers that the processor runs with.
        count_exit(mmu, v.number, EXIT_EMULATE, va)
        return RC_EMULATE
    if mmu.flood_reset:
        v.flood_count = 0
    if leaf.filled:
        count_exit(mmu, v.number, EXIT_FILL, va)
    else:
        count_exit(mmu, v.number, EXIT_WRITE, va)
        if not leaf.changed:
            mmu.stats.pf_spurious += 1
    return RC_RETRY if fault else _repeated(mmu, v, access, leaf.spte)


cdef int page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """A page-fault exit: the processor's walk `hw` of the shadow failed.

    RC_OK: the shadow was mended, and the processor's next walk leads to w.gpa. RC_RETRY: the shadow was mended.
    RC_EMULATE, RC_MMIO: at w.gpa. RC_PF: the guest's own fault, w.error_code.
    """
    cdef int rc
    audit_point(mmu, POINT_PRE_FAULT)
    rc = _page_fault(mmu, v, access, hw, w)
    audit_point(mmu, POINT_POST_FAULT)
    return rc
