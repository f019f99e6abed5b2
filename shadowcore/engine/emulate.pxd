"""Stores to guest physical memory that the shadow has to hear of."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u8, u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef void table_written(sc_mmu *mmu, u64 gpa, u32 nbytes, bint flooded) noexcept nogil
cdef void emulate_store(sc_mmu *mmu, sc_vcpu *v, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil
cdef void device_store(sc_mmu *mmu, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil
cdef void walk_updated(sc_mmu *mmu, const sc_vcpu *v, const sc_walk *w) noexcept nogil
cdef void store_followed(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil
