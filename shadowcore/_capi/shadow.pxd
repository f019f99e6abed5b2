"""The tables that a vcpu's processor walks, of the C interface."""
from libc.stdint cimport uint32_t

from shadowcore._capi.header cimport sc_pool, sc_root, sc_shadow_page, sc_vm

cdef int api_shadow_root(sc_vm vm, uint32_t vcpu, sc_root *root) noexcept nogil
cdef int api_shadow_pool(sc_vm vm, sc_pool *pool) noexcept nogil
cdef int api_shadow_page(sc_vm vm, uint32_t number, sc_shadow_page *page) noexcept nogil
