"""What a page fault of the guest makes the caches forget (SDM vol. 3, 4.10.4.1): the modelled TLB, and the design's."""
from shadowcore.engine.design cimport design_guest_fault
from shadowcore.engine.flushes cimport FLUSH_FAULT, flush_lost
from shadowcore.engine.state cimport sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport TLB_ANY_PCID, tlb_flush_fault
from shadowcore.engine.types cimport u16, u32, u64


cdef void invalidate_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """A page fault of the guest at `va`: nothing that is cached for the page, and is not what the guest's tables say
    now, serves another access. Of tables above the leaves no design caches what the guest's say."""
    cdef u16 pcid = vcpu_pcid(v)
    if design_guest_fault(mmu, v, va, code):
        pcid = TLB_ANY_PCID         # no entry may outlive the leaf that it was made of
    if v.tlb != NULL:
        tlb_flush_fault(v.tlb, va, pcid, flush_lost(mmu, FLUSH_FAULT))


cdef void deliver_fault(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """The processor delivers a page fault at `va` to the guest by itself: no leaf is there, and the design hears of
    nothing."""
    v.cr2 = va
    mmu.stats.pf_guest += 1
    if v.tlb != NULL:
        tlb_flush_fault(v.tlb, va, vcpu_pcid(v), flush_lost(mmu, FLUSH_FAULT))


cdef void inject_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """The guest gets a page fault at `va`: CR2, its count, and what it makes the caches forget."""
    v.cr2 = va
    mmu.stats.pf_guest += 1
    invalidate_fault(mmu, v, va, code)
