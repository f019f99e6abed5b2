"""Accesses of a guest, one or many, and of the embedder to its memory."""
from libc.stdint cimport uint64_t

from shadowcore._capi.header cimport sc_access, sc_accesses, sc_outcome, sc_vm

cdef int api_access(sc_vm vm, const sc_access *given, sc_outcome *o) noexcept nogil
cdef int api_translate(sc_vm vm, const sc_access *a, sc_outcome *o) noexcept nogil
cdef int api_access_many(sc_vm vm, sc_accesses *given) noexcept nogil
cdef int api_store(sc_vm vm, uint64_t gpa, const void *data, uint64_t size) noexcept nogil
cdef int api_stored(sc_vm vm, uint64_t gpa, uint64_t size) noexcept nogil
cdef int api_host_address(sc_vm vm, uint64_t gpa, void **host) noexcept nogil
