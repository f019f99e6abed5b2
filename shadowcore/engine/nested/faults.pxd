"""Exits of nested paging: the host's tables refused a walk."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef int host_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil
