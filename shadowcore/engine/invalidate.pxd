"""What the guest's page faults drop of a linear address (SDM vol. 3, 4.10.4.1)."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef void invalidate_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil
cdef void inject_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil
cdef void deliver_fault(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil
cdef int invalidate_pcid(sc_mmu *mmu, sc_vcpu *v, u32 kind, u64 pcid, u64 va, bint user) noexcept nogil
