"""Emulated stores to guest tables under design unsync."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef void other_instruction(const sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef bint run_again(sc_mmu *mmu, sc_vcpu *v, u64 va, u64 gpa) noexcept nogil
cdef void stored(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil
