"""shadowcore_plugin.h, for plug-ins in Cython: see there, and docs/plugins.md."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "shadowcore_plugin.h" nogil:
    const char *SC_POLICY_CAPSULE
    const char *SC_DECISIONS_CAPSULE
    const uint32_t SC_PLUGIN_NO_PAGE
    const size_t SC_PLUGIN_FAILED
    const size_t SC_PLUGIN_STATE_MAX

    enum:
        SC_DECIDE_EMULATE
        SC_DECIDE_UNPROTECT
        SC_DECIDE_UNSYNC
        SC_DECIDE_ZAP

    ctypedef struct sc_plugin_page:
        uint64_t gfn
        uint32_t role, root_count
        uint32_t links[4]
        uint32_t present
        uint8_t active, nonglobal, unsync, flood

    ctypedef struct sc_plugin_host:
        uint32_t struct_size, pool_pages
        const void *pages
        uint32_t page_size, reserved

    const sc_plugin_page *sc_plugin_page_at(const sc_plugin_host *host, uint32_t page)

    ctypedef struct sc_policy_plugin:
        uint32_t struct_size, reserved
        void *(*open)(const sc_plugin_host *host) noexcept nogil
        void (*close)(void *state) noexcept nogil
        void (*made)(void *state, uint32_t page) noexcept nogil
        void (*used)(void *state, uint32_t page) noexcept nogil
        void (*gone)(void *state, uint32_t page) noexcept nogil
        uint32_t (*victim)(void *state) noexcept nogil
        size_t (*save)(void *state, void *bytes, size_t room) noexcept nogil
        int (*restore)(void *state, const void *bytes, size_t size) noexcept nogil

    ctypedef struct sc_table_store:
        uint32_t struct_size, nbytes
        uint64_t gva, gpa, gfn
        const uint32_t *pages
        const uint8_t *levels
        uint32_t n_pages
        uint8_t in_use, unsync
        uint16_t reserved

    ctypedef struct sc_decisions_plugin:
        uint32_t struct_size, reserved
        void *(*open)(const sc_plugin_host *host) noexcept nogil
        void (*close)(void *state) noexcept nogil
        int (*store)(void *state, const sc_table_store *store) noexcept nogil
        size_t (*save)(void *state, void *bytes, size_t room) noexcept nogil
        int (*restore)(void *state, const void *bytes, size_t size) noexcept nogil
