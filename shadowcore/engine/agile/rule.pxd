"""Which guest tables the processor walks itself, and when that changes."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

cdef bint table_is_nested(const sc_mmu *mmu, u64 gfn) noexcept nogil
cdef u32 table_mark(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil
cdef void table_stored(sc_mmu *mmu, u64 gfn) noexcept nogil
cdef void table_to_shadow(sc_mmu *mmu, u64 gfn) noexcept nogil
cdef void interval_goes_on(sc_mmu *mmu) noexcept nogil
