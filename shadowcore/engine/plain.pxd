"""The fault that most faults are."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef u64 fault_plain(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, bint *emulate) noexcept nogil
