"""The guest kernel's boot: its half of the address space, and paging on."""
from shadowcore.engine.types cimport u64
from shadowcore.guest.state cimport sc_guest

cdef int boot_tables(sc_guest *g, int large_level, bint global_) noexcept nogil
cdef int boot_registers(sc_guest *g, bint global_) noexcept nogil
