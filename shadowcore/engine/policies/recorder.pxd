"""The uses of shadow pages, written down in their order."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u64

cdef struct sc_references:
    u64 *use                        # keys (queues_key) of pages, as they were used
    u64 n
    u64 *death                      # keys of pages that went, and were not recycled
    u64 *death_at                   # ... and uses before that
    u64 deaths
    int failed                      # the host had no memory for more

cdef void recorder_policy(sc_mmu *mmu) noexcept nogil
cdef void references_free(sc_references *r) noexcept nogil
