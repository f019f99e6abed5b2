"""Page faults of the guest's processes."""
from shadowcore.engine.types cimport u32, u64
from shadowcore.guest.state cimport sc_guest

cdef int leaf_install(sc_guest *g, u32 p, u64 table, u32 index, u64 entry) noexcept nogil
cdef int fault_service(sc_guest *g, u32 p, u64 va, u32 code) noexcept nogil
