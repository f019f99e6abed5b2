"""The host's tables below marks, and the exits at which they are filled."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef void host_tables_in_place(const sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef int host_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *hw,
                    sc_walk *w) noexcept nogil
