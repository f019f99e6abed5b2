"""What page faults of the guest, and INVPCID, make the caches forget (SDM vol. 3, 4.10.4.1): the modelled TLB, and the
design's."""
from shadowcore.engine.bits cimport CR4_PCIDE
from shadowcore.engine.counters cimport EXIT_INVLPG
from shadowcore.engine.design cimport design_exit, design_guest_fault, design_invpcid
from shadowcore.engine.features cimport FEAT_INVPCID
from shadowcore.engine.flushes cimport FLUSH_FAULT, FLUSH_INVLPG, flush_lost
from shadowcore.engine.state cimport linear_address, linear_exists, sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport (
    INVPCID_ADDRESS, INVPCID_CONTEXT, INVPCID_TYPES, TLB_ANY_PCID, tlb_flush_caches, tlb_flush_fault, tlb_flush_invpcid,
)
from shadowcore.engine.types cimport RC_GP, RC_OK, RC_UD, u16, u32, u64


cdef void invalidate_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """A page fault of the guest at `va`: nothing that is cached for the page, and is not what the guest's tables say
    now, serves another access. Of tables above the leaves no design caches what the guest's say."""
    cdef u16 pcid = vcpu_pcid(v)
    if design_guest_fault(mmu, v, va, code):
        pcid = TLB_ANY_PCID         # no entry may outlive the leaf that it was made of
    if v.tlb != NULL:
        tlb_flush_fault(v.tlb, va, pcid, flush_lost(mmu, FLUSH_FAULT))
        tlb_flush_caches(v.tlb, va, vcpu_pcid(v), False)


cdef void deliver_fault(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """The processor delivers a page fault at `va` to the guest by itself: no leaf is there, and the design hears of
    nothing."""
    v.cr2 = va
    mmu.stats.pf_guest += 1
    if v.tlb != NULL:
        tlb_flush_fault(v.tlb, va, vcpu_pcid(v), flush_lost(mmu, FLUSH_FAULT))
        tlb_flush_caches(v.tlb, va, vcpu_pcid(v), False)


cdef void inject_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """The guest gets a page fault at `va`: CR2, its count, and what it makes the caches forget."""
    v.cr2 = va
    mmu.stats.pf_guest += 1
    invalidate_fault(mmu, v, va, code)


cdef int invalidate_pcid(sc_mmu *mmu, sc_vcpu *v, u32 kind, u64 pcid, u64 va, bint user) noexcept nogil:
    """INVPCID, whose operand was read before: RC_OK, or what SDM vol. 2 has it refused with, in no order that shows."""
    if not v.features & FEAT_INVPCID:
        return RC_UD
    va = linear_address(v, va)
    if (user or kind >= INVPCID_TYPES or pcid >> 12 or (kind <= INVPCID_CONTEXT and pcid and not v.cr4 & CR4_PCIDE)
            or (kind == INVPCID_ADDRESS and not linear_exists(v, va))):
        mmu.stats.gp_guest += 1
        return RC_GP
    mmu.stats.invpcid += 1
    if v.tlb != NULL:
        tlb_flush_invpcid(v.tlb, kind, <u16>pcid, va, flush_lost(mmu, FLUSH_INVLPG))
    design_exit(mmu, v.number, EXIT_INVLPG, va)
    design_invpcid(mmu, v, kind, <u16>pcid, va)
    return RC_OK
