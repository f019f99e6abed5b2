"""An access that the TLB translates: the text of it, for the general way and for batches."""
from shadowcore.engine.memory cimport mem_is_device, mem_touch
from shadowcore.engine.state cimport sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport TLB_FETCH, TLB_LOAD, TLB_STORE, sc_tlb_entry, tlb_look, tlb_use
from shadowcore.engine.types cimport PF_I, PF_W, u16, u32, u64
from shadowcore.engine.walker cimport rights_fault

cdef inline u32 tlb_kind(u32 access) noexcept nogil:
    """TLB_* of an access (PF_*)."""
    return TLB_FETCH if access & PF_I else TLB_STORE if access & PF_W else TLB_LOAD

cdef inline bint tlb_hit(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u64 *gpa) noexcept nogil:
    """The TLB translates `va` for `access`. Rights are judged at each use, by the registers as they are; where an entry
    does not do, the tables are walked: real processors do the same before they report a fault. False: nothing happened,
    and nothing is counted."""
    cdef u32 bank = 0
    cdef u32 kind = tlb_kind(access)
    cdef sc_tlb_entry *e = tlb_look(v.tlb, va, vcpu_pcid(v), mmu.flush_epoch, kind, &bank)
    if (e == NULL or (access & PF_W and not e.dirty)
            or rights_fault(&v.hw if mmu.shadow else &v.guest, e.access, e.pkey, access)):
        return False
    gpa[0] = e.gpa | (va & ((<u64>1 << e.shift) - 1))
    if mem_is_device(mmu.mem, gpa[0] >> 12, access):
        return False                # the part of a large page that lies beyond RAM; a store to a read-only slot
    if not mmu.shadow:
        mem_touch(mmu.mem, gpa[0] >> 12, access & PF_W != 0)
    tlb_use(v.tlb, bank, e, mmu.flush_epoch, kind)
    mmu.stats.tlb_hits += 1
    (&mmu.stats.tlb_load_hits)[3 * (v.tlb.bank[bank].level - 1) + (kind >> 1)] += 1
    return True
