"""The page-fault entry: what an exit becomes."""
from shadowcore.engine.absent cimport walk_mark
from shadowcore.engine.bits cimport PTE_D, level_index
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_GUEST, EXIT_MMIO
from shadowcore.engine.design cimport design_make_room
from shadowcore.engine.emulate cimport walk_updated
from shadowcore.engine.fetch cimport fetch
from shadowcore.engine.hooks cimport POINT_POST_FAULT, POINT_PRE_FAULT, audit_point
from shadowcore.engine.invalidate cimport invalidate_fault
from shadowcore.engine.leaf cimport fault_count, sc_fault
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_frame, mem_guest_frame, mem_is_rom, mem_touch, sc_no_frame
from shadowcore.engine.quirks cimport QUIRK_PROCESSOR_CODE, QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_TWO_EXITS
from shadowcore.engine.roots cimport release_everything
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_U, MODE_OFF, PF_P, PF_RSVD, PF_W, RC_EMULATE, RC_EXHAUSTED, RC_MMIO, RC_OK, RC_PF, RC_RETRY, u32, u64,
)
from shadowcore.engine.walker cimport guest_walk, sc_walk, walk_index


cdef inline int _inject(sc_mmu *mmu, sc_vcpu *v, sc_fault *f, u32 code, sc_walk *w) noexcept nogil:
    v.cr2 = f.va
    w.error_code = code
    invalidate_fault(mmu, v, f.va, code)
    f.kind = EXIT_GUEST
    fault_count(mmu, v, f)
    return RC_PF


cdef int _fetch_with_room(sc_mmu *mmu, sc_vcpu *v, const sc_walk *hw, const sc_walk *w, sc_fault *f) noexcept nogil:
    """fetch, and once more with all the room there can be."""
    if fetch(mmu, v, hw, w, f) == RC_OK:
        return RC_OK
    release_everything(mmu, v, f.va)
    return fetch(mmu, v, NULL, w, f)


cdef inline void _found(const sc_mmu *mmu, sc_fault *f, const sc_walk *w) noexcept nogil:
    """What a complete walk of the guest's tables, refused or not, came to."""
    f.gpa = w.gpa
    f.frame = mem_frame(mmu.mem, w.gpa >> 12)
    f.level = w.level
    f.rights = w.access
    f.pkey = w.pkey
    f.dirtied = w.dirtied
    if f.mode == MODE_OFF:
        f.gpte = f.dirty = PTE_D    # nothing waits for a first store
        return
    f.gpte = w.entry[w.level]
    f.table = w.table[w.level]
    f.low = mem_guest_frame(mmu.mem, f.table << 12) + walk_index(w, w.level) * w.pte_size
    f.dirty = f.gpte & PTE_D


cdef inline int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    cdef sc_fault f
    cdef u64 epoch = mmu.memo_epoch
    cdef u32 looks
    f.va = hw.va
    f.access = access
    f.code = hw.error_code
    f.mode = v.guest.mode
    f.quirks = mmu.quirks
    f.tlb = v.tlb != NULL or mmu.walks != NULL     # the repeated walk has to be seen
    f.logging = mmu.mem.logging
    f.special = mmu.mem.special
    f.changed = False
    if not design_make_room(mmu, v, f.va):
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    f.refused = guest_walk(mmu.mem, &v.guest, f.va, access, w) == RC_PF
    f.read = w.references
    f.walked = 0
    if w.updated:
        walk_updated(mmu, v, w)
    if f.refused:
        # A rights violation, met at the end of a complete walk, is noticed by the series only when a leaf is there
        # and nothing about it can be mended: for a load from a user page, that the leaf is not (CR0.WP = 0). With
        # ROLE_WITHOUT_ACCESS it is judged by that leaf.
        looks = QUIRK_TWO_EXITS
        if f.code & PF_P:
            looks = QUIRK_ROLE_WITHOUT_ACCESS | (0 if access & PF_W or not w.access & ACC_U else QUIRK_TWO_EXITS)
        if w.error_code & (PF_P | PF_RSVD) != PF_P or not mmu.quirks & looks:
            if mmu.absent and hw.level == 1 and mmu.memo_epoch == epoch and not w.error_code & PF_P:
                walk_mark(mmu, <u32>(hw.table[1] - SC_POOL_HFN) * 512 + level_index(f.va, 1))
            return _inject(mmu, v, &f, f.code if mmu.quirks & QUIRK_PROCESSOR_CODE else w.error_code, w)
    _found(mmu, &f, w)
    if f.special and f.frame != sc_no_frame():      # a refused access makes a leaf as well
        if access & PF_W and not f.refused and mem_is_rom(mmu.mem, f.gpa >> 12):
            f.kind = EXIT_MMIO      # no leaf lets it pass, and none has to
            fault_count(mmu, v, &f)
            return RC_MMIO
        mem_touch(mmu.mem, f.gpa >> 12, access & PF_W and not f.refused)
        if mmu.memo_epoch != epoch:
            f.code &= ~<u32>PF_P    # the leaf that refused the access may be gone
    if f.frame == sc_no_frame() and f.mode == MODE_OFF:
        f.kind = EXIT_MMIO          # no leaf remembers it
    # The failed walk knows the path to the leaf, if it came that far and nothing was withdrawn since.
    elif _fetch_with_room(mmu, v, hw if mmu.memo_epoch == epoch else NULL, w, &f) != RC_OK:
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    if f.kind == EXIT_GUEST:
        return _inject(mmu, v, &f, f.error_code, w)
    fault_count(mmu, v, &f)
    if f.kind == EXIT_EMULATE:
        return RC_EMULATE
    if f.kind == EXIT_MMIO:
        return RC_MMIO
    return RC_OK if f.repeats else RC_RETRY


cdef int page_fault_usual(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """page_fault, between its audits, of the designs that do not have another (sc_design.page_fault)."""
    return _page_fault(mmu, v, access, hw, w)


cdef int page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """A page-fault exit: the processor's walk `hw` of the shadow failed.

    RC_OK: the shadow was mended, and the processor's next walk leads to w.gpa. RC_RETRY: the shadow was mended.
    RC_EMULATE, RC_MMIO: at w.gpa. RC_PF: the guest's own fault, w.error_code.
    """
    cdef int rc
    audit_point(mmu, POINT_PRE_FAULT)
    if mmu.design.page_fault != NULL:
        rc = mmu.design.page_fault(mmu, v, access, hw, w)
    else:
        rc = _page_fault(mmu, v, access, hw, w)
    audit_point(mmu, POINT_POST_FAULT)
    return rc
