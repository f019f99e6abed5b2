"""VMs of the C interface: made, adopted, saved, loaded, given back."""
from libc.stdint cimport uint64_t

from shadowcore._capi.header cimport sc_config, sc_vm

cdef int api_vm_create(const sc_config *given, sc_vm *vm) noexcept nogil
cdef int api_vm_destroy(sc_vm vm) noexcept nogil
cdef int api_vm_adopt(void *object_, sc_vm *vm) noexcept nogil
cdef int api_save(sc_vm vm, const char *path) noexcept nogil
cdef int api_vm_load(const char *path, void *memory, uint64_t size, sc_vm *vm) noexcept nogil
