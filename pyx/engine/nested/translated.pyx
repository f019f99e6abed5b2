"""What a TLB holds of nested paging, beside the host's tables as they are: for audits (I8)."""
from shadowcore.engine.bits cimport PTE_P, PTE_PS, PTE_W, level_index, level_mask, pte_addr
from shadowcore.engine.memory cimport mem_frame, mem_frame_hpa, mem_pool_page, sc_no_frame
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.tlb cimport sc_tlb_entry
from shadowcore.engine.types cimport ACC_W, u32, u64


cdef u64 _leaf(const sc_mmu *mmu, u32 page, u64 gpa, u64 *mask) noexcept nogil:
    """The leaf that maps gpa, from root `page`, or 0; mask: of the bits of an address that it leaves as they are.
    Whatever is in the arrays, it stays within them."""
    cdef int level = mmu.host_levels
    cdef u64 value
    while page < mmu.pool_pages and level > 0:
        value = mmu.table[page * 512 + level_index(gpa, level)]
        if not value & PTE_P:
            return 0
        if level == 1 or value & PTE_PS:
            mask[0] = level_mask(level)
            return value
        page = mem_pool_page(value)
        level -= 1
    return 0


cdef bint in_host_tables(const sc_mmu *mmu, u32 page, const sc_tlb_entry *e) noexcept nogil:
    cdef u64 mask = 0
    cdef u64 leaf = _leaf(mmu, page, e.gpa, &mask)
    cdef u64 frame = mem_frame(mmu.mem, e.gpa >> 12)
    return (leaf and frame != sc_no_frame() and (leaf & PTE_W or not (e.access & ACC_W and e.dirty))
            and ((leaf & pte_addr()) | (e.gpa & mask & pte_addr())) == mem_frame_hpa(mmu.mem, frame))


cdef bint maps_host(const sc_mmu *mmu, u32 page, const sc_tlb_entry *e) noexcept nogil:
    cdef u64 mask = 0
    cdef u64 gpa = e.page & ~<u64>1
    cdef u64 leaf = _leaf(mmu, page, gpa, &mask)
    return leaf and (leaf & PTE_W or not e.dirty) and ((leaf & pte_addr() & ~mask) | (gpa & mask)) == e.gpa
