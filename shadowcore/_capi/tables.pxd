"""Guests' page tables of the C interface."""
from libc.stdint cimport uint32_t, uint64_t

from shadowcore._capi.header cimport sc_entry, sc_mapping, sc_tables, sc_vm

cdef int api_tables_map(sc_vm vm, sc_tables *tables, const sc_mapping *mapping) noexcept nogil
cdef int api_tables_protect(sc_vm vm, sc_tables *tables, const sc_mapping *mapping) noexcept nogil
cdef int api_tables_unmap(sc_vm vm, sc_tables *tables, uint64_t gva, uint64_t size) noexcept nogil
cdef int api_tables_entry(sc_vm vm, const sc_tables *tables, uint64_t gva, sc_entry *entry) noexcept nogil
cdef int api_tables_activate(sc_vm vm, uint32_t vcpu, const sc_tables *tables) noexcept nogil
