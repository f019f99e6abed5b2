"""Processes of the guest: their making and ending, the scheduler, ageing and swapping out."""
from shadowcore.engine.types cimport u32, u64
from shadowcore.guest.state cimport sc_guest

cdef int process_spawn(sc_guest *g, u32 p, u32 program, bint bare, u64 heap) noexcept nogil
cdef int process_switch(sc_guest *g, u32 p) noexcept nogil
cdef int process_idle(sc_guest *g) noexcept nogil
cdef int process_reap(sc_guest *g) noexcept nogil
cdef int process_fork(sc_guest *g, u32 p, u32 child) noexcept nogil
cdef int process_exec(sc_guest *g, u32 p, u32 program, bint bare, u64 heap) noexcept nogil
cdef int process_exit(sc_guest *g, u32 p) noexcept nogil
cdef int process_age(sc_guest *g, u32 p, u64 pages, u64 *young) noexcept nogil
cdef int process_swap_out(sc_guest *g, u32 p, u64 pages, u64 *done) noexcept nogil
