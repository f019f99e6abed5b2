"""From a linear address to a gpa, with all exits and side effects."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef int resolve(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil
