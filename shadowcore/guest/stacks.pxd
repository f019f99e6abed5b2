"""Kernel stacks of processes, in the direct map or in an area of their own."""
from shadowcore.engine.types cimport u32, u64
from shadowcore.guest.state cimport sc_guest

cdef u64 stack_places(const sc_guest *g) noexcept nogil
cdef int stack_take(sc_guest *g, u32 p) noexcept nogil
cdef int stack_give(sc_guest *g, u32 p) noexcept nogil
cdef int stack_check(sc_guest *g, u32 p) noexcept nogil
