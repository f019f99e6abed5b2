"""The fast path of a page fault."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef enum:
    NO_EXIT = 2                     # where fault_fast says whether the store is to be emulated

cdef u64 fault_fast(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, int *emulate) noexcept nogil
