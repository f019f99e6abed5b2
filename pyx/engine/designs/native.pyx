"""Design `native`: the processor walks the guest's own tables; there is no shadow."""
from shadowcore.engine.state cimport memo_drop, sc_mmu


cdef void _begin(sc_mmu *mmu) noexcept nogil:
    """Between batches anybody may have written to the tables that translations were made of."""
    memo_drop(mmu)


cdef void native_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design."""
    mmu.shadow = False
    mmu.by_table = False
    mmu.design.begin = _begin
