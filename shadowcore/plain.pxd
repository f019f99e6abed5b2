"""The fault that most faults are."""
from shadowcore.state cimport sc_mmu, sc_vcpu
from shadowcore.types cimport u32, u64

cdef u64 fault_plain(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, bint *emulate) noexcept nogil
