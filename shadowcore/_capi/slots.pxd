"""Memory slots of the C interface, and what the host has under guest RAM."""
from libc.stdint cimport uint32_t, uint64_t

from shadowcore._capi.header cimport sc_new_slot, sc_vm

cdef int api_slot_add(sc_vm vm, const sc_new_slot *given, uint32_t *number) noexcept nogil
cdef int api_slot_remove(sc_vm vm, uint32_t number) noexcept nogil
cdef int api_slot_move(sc_vm vm, uint32_t number, uint64_t gpa) noexcept nogil
cdef int api_host_unmap(sc_vm vm, uint64_t gfn, uint64_t n, uint32_t discard) noexcept nogil
cdef int api_host_touch(sc_vm vm, uint64_t gfn, uint64_t n, uint32_t write) noexcept nogil
cdef int api_host_collapse(sc_vm vm, uint64_t gfn, uint64_t n) noexcept nogil
