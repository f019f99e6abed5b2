"""Registers, and what the engine did: counters, prices, events, audits."""
from libc.stdint cimport uint32_t, uint64_t

from shadowcore._capi.header cimport (
    sc_audit_result, sc_counters, sc_event_function, sc_prices, sc_reference_function, sc_vm,
)

cdef int api_register_read(sc_vm vm, uint32_t vcpu, uint32_t reg, uint64_t *value) noexcept nogil
cdef int api_register_load(sc_vm vm, uint32_t vcpu, uint32_t reg, uint64_t value) noexcept nogil
cdef int api_invlpg(sc_vm vm, uint32_t vcpu, uint64_t gva) noexcept nogil
cdef int api_invpcid(sc_vm vm, uint32_t vcpu, uint64_t kind, const uint64_t *descriptor) noexcept nogil
cdef int api_vcpu_init(sc_vm vm, uint32_t vcpu) noexcept nogil
cdef int api_counters(sc_vm vm, sc_counters *counters) noexcept nogil
cdef int api_prices(const char *preset, sc_prices *prices) noexcept nogil
cdef int api_prices_for(sc_vm vm, const char *preset, sc_prices *prices) noexcept nogil
cdef int api_set_prices(sc_vm vm, const sc_prices *prices) noexcept nogil
cdef int api_cycles(sc_vm vm, double *cycles) noexcept nogil
cdef int api_on_event(sc_vm vm, uint32_t mask, sc_event_function function, void *context) noexcept nogil
cdef int api_on_references(sc_vm vm, sc_reference_function function, void *context) noexcept nogil
cdef int api_audit(sc_vm vm, sc_audit_result *result) noexcept nogil
