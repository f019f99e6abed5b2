"""The guest kernel's boot: its half of the address space, and paging on."""
from shadowcore.guest cimport sc_guest
from shadowcore.types cimport u64

cdef int boot_tables(sc_guest *g, int large_level, bint global_) noexcept nogil
cdef int boot_registers(sc_guest *g, bint global_) noexcept nogil
