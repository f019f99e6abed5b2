"""A virtual processor: accesses one by one or in batches."""
from shadowcore.engine.access cimport sc_result
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef class Translation:
    cdef sc_walk w
    cdef int mode

cdef class VCpu:
    cdef sc_vcpu c
    cdef readonly Mmu mmu
    cdef object _tlb                # arrays behind c.tlb
    cdef object _memo               # array behind c.memo

    cdef Mmu _idle(self)
    cdef int _walk(self, u64 va, u32 access, object user, Translation t) except -1
    cdef int _access(self, u32 op, object gva, object size, object user, object value, object expected,
                     sc_result *r) except -1

cdef sc_mmu *mmu_struct(object vm) except NULL
cdef sc_vcpu *vcpu_struct(object vm, u32 number) except NULL
