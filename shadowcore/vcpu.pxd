"""A virtual processor: accesses one by one or in batches."""
from shadowcore.mmu cimport Mmu
from shadowcore.state cimport sc_mmu, sc_vcpu
from shadowcore.types cimport u8, u16, u32, u64
from shadowcore.walker cimport sc_walk

cdef struct sc_result:              # what became of one access or register load
    u64 gpa                         # where it led; all ones if nowhere
    u64 value                       # what a load or fetch read
    u32 error_code                  # of a guest fault
    u32 exits                       # page-fault exits it took
    u8 outcome                      # RC_OK, RC_PF, RC_GP or RC_MMIO
    u8 emulated                     # stores to RAM that the emulator did

cdef int vcpu_access(sc_mmu *mmu, sc_vcpu *v, u32 op, u64 va, bint user, u32 size, u64 value, bint data,
                     sc_result *r) noexcept nogil
cdef int vcpu_op(sc_mmu *mmu, sc_vcpu *v, u32 op, bint user, u32 size, u64 addr, u64 value, bint data,
                 sc_result *r) noexcept nogil

cdef class Translation:
    cdef sc_walk w
    cdef int mode

cdef class VCpu:
    cdef sc_vcpu c
    cdef readonly Mmu mmu
    cdef object _tlb                # arrays behind c.tlb

    cdef Mmu _idle(self)
    cdef int _walk(self, u64 va, u32 access, object user, Translation t) except -1
    cdef int _access(self, u32 op, object gva, object size, object user, u64 value, sc_result *r) except -1

cdef object host_error(Mmu mmu, int rc)
