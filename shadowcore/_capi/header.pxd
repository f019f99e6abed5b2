"""shadowcore.h: its structures, codes and the table of functions. What each means is said there."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from shadowcore.engine.prices cimport sc_prices

cdef extern from "shadowcore.h" nogil:
    enum:
        SC_ABI_VERSION
        SC_E_NULL
        SC_E_STRUCT
        SC_E_HANDLE
        SC_E_BUSY
        SC_E_ARGUMENT
        SC_E_ALIGNMENT
        SC_E_MEMORY
        SC_E_POOL
        SC_E_FILE
        SC_E_PYTHON
        SC_E_CALLBACK
        SC_E_ENGINE
        SC_CR0
        SC_CR2
        SC_CR3
        SC_CR4
        SC_EFER
        SC_PKRU
        SC_AC
        SC_CPL
        SC_DATA
        SC_BRIEF
        SC_IMPLICIT
        SC_AMD
        SC_SETTING_ZERO
        SC_CACHED
        SC_UNSYNC
        SC_NESTED
        SC_AGILE
        SC_ADAPTIVE
        SC_EXITS
        SC_ANY_LEVEL
    const char *SC_CAPSULE
    ctypedef uint64_t sc_vm

    ctypedef struct sc_memory_slot:
        uint64_t gpa
        uint64_t size

    ctypedef struct sc_config:
        uint32_t struct_size, design
        void *memory
        uint64_t memory_size
        const sc_memory_slot *slots
        uint32_t n_slots, vcpus, pool_pages, min_free, refill, flood_threshold, quirks, features, maxphyaddr
        uint32_t tlb_entries[3]
        uint32_t tlb_ways[3]
        uint32_t reserved, prev_roots, prefetch
        uint64_t host_page_size
        uint32_t vendor, reserved_2
        uint32_t policy, uses, recycle_children, reserved_3
        uint64_t policy_seed
        uint32_t update_in_place, flood_pages, flood_forget, reserved_4

    ctypedef struct sc_access:
        uint32_t struct_size, vcpu
        uint64_t gva
        uint8_t kind, size, user, flags
        uint32_t reserved
        uint64_t value[2]
        uint64_t expected[2]

    ctypedef struct sc_outcome:
        uint32_t struct_size, error_code
        uint64_t gpa, hpa
        void *host
        uint64_t value[2]
        uint32_t exits, references, guest_references, cycles
        uint8_t outcome, emulated, page_shift, rights
        uint32_t reserved

    ctypedef struct sc_accesses:
        uint32_t struct_size, vcpu
        uint64_t count
        const uint64_t *gva
        const uint64_t *value
        const uint8_t *kind
        const uint8_t *size
        const uint8_t *user
        uint8_t all_kind, all_size, all_user, flags
        uint32_t reserved
        uint64_t *gpa
        uint64_t *loaded
        uint16_t *error_code
        uint16_t *exits
        uint8_t *outcome
        uint8_t *emulated
        uint64_t done

    ctypedef struct sc_counters:
        uint32_t struct_size, reserved
        uint64_t exits[1]

    ctypedef struct sc_event:
        uint32_t struct_size, kind, detail, vcpu
        uint64_t address
        sc_vm vm
        uint64_t frames

    ctypedef void (*sc_event_function)(void *context, const sc_event *event) noexcept nogil

    ctypedef struct sc_reference:
        uint64_t hpa, gva
        uint32_t walk
        uint8_t vcpu, level, dimension, size

    ctypedef void (*sc_reference_function)(void *context, const sc_reference *, uint32_t) noexcept nogil

    ctypedef struct sc_audit_result:
        uint32_t struct_size, violations
        uint64_t sptes
        uint32_t invariant, page, index, reserved
        uint64_t gfn

    ctypedef struct sc_new_slot:
        uint32_t struct_size, number
        uint64_t gpa, size, offset, host_page_size
        uint8_t dirty_log, read_only, backing
        uint8_t reserved[5]

    ctypedef struct sc_tables:
        uint32_t struct_size, mode
        uint64_t root, next_gfn, frames

    ctypedef struct sc_mapping:
        uint32_t struct_size, rights
        uint64_t gva, gpa, size, page_size, bits
        uint8_t global_, pkey, accessed, dirty
        uint8_t reserved[4]

    ctypedef struct sc_entry:
        uint32_t struct_size, level
        uint64_t gpa, value

    ctypedef struct sc_root:
        uint32_t struct_size, mode
        uint64_t hpa
        uint64_t pdpte[4]

    ctypedef struct sc_pool:
        uint32_t struct_size, pages, active, reserved
        const uint64_t *tables
        uint64_t tables_hpa
        void *ram
        uint64_t ram_hpa, ram_size

    ctypedef struct sc_shadow_page:
        uint32_t struct_size, root_count
        uint64_t hpa, gfn
        uint8_t active, level, guest_mode, quadrant, direct, rights, unsync, reserved

    ctypedef struct sc_api:
        uint32_t abi_version, struct_size
        const char *version
        int (*vm_create)(const sc_config *, sc_vm *) noexcept nogil
        int (*vm_destroy)(sc_vm) noexcept nogil
        int (*register_read)(sc_vm, uint32_t, uint32_t, uint64_t *) noexcept nogil
        int (*register_load)(sc_vm, uint32_t, uint32_t, uint64_t) noexcept nogil
        int (*invlpg)(sc_vm, uint32_t, uint64_t) noexcept nogil
        int (*access)(sc_vm, const sc_access *, sc_outcome *) noexcept nogil
        int (*translate)(sc_vm, const sc_access *, sc_outcome *) noexcept nogil
        int (*access_many)(sc_vm, sc_accesses *) noexcept nogil
        int (*store)(sc_vm, uint64_t, const void *, uint64_t) noexcept nogil
        int (*stored)(sc_vm, uint64_t, uint64_t) noexcept nogil
        int (*host_address)(sc_vm, uint64_t, void **) noexcept nogil
        int (*counters)(sc_vm, sc_counters *) noexcept nogil
        int (*on_event)(sc_vm, uint32_t, sc_event_function, void *) noexcept nogil
        int (*audit)(sc_vm, sc_audit_result *) noexcept nogil
        int (*save)(sc_vm, const char *) noexcept nogil
        int (*vm_load)(const char *, void *, uint64_t, sc_vm *) noexcept nogil
        const char *(*last_error)() noexcept nogil
        int (*vm_adopt)(void *, sc_vm *) noexcept nogil
        int (*prices)(const char *, sc_prices *) noexcept nogil
        int (*set_prices)(sc_vm, const sc_prices *) noexcept nogil
        int (*cycles)(sc_vm, double *) noexcept nogil
        int (*slot_add)(sc_vm, const sc_new_slot *, uint32_t *) noexcept nogil
        int (*slot_remove)(sc_vm, uint32_t) noexcept nogil
        int (*slot_move)(sc_vm, uint32_t, uint64_t) noexcept nogil
        int (*host_unmap)(sc_vm, uint64_t, uint64_t, uint32_t) noexcept nogil
        int (*host_touch)(sc_vm, uint64_t, uint64_t, uint32_t) noexcept nogil
        int (*host_collapse)(sc_vm, uint64_t, uint64_t) noexcept nogil
        int (*invpcid)(sc_vm, uint32_t, uint64_t, const uint64_t *) noexcept nogil
        int (*vcpu_init)(sc_vm, uint32_t) noexcept nogil
        int (*on_references)(sc_vm, sc_reference_function, void *) noexcept nogil
        int (*prices_for)(sc_vm, const char *, sc_prices *) noexcept nogil
        int (*shadow_root)(sc_vm, uint32_t, sc_root *) noexcept nogil
        int (*shadow_pool)(sc_vm, sc_pool *) noexcept nogil
        int (*shadow_page)(sc_vm, uint32_t, sc_shadow_page *) noexcept nogil
        int (*tables_map)(sc_vm, sc_tables *, const sc_mapping *) noexcept nogil
        int (*tables_unmap)(sc_vm, sc_tables *, uint64_t, uint64_t) noexcept nogil
        int (*tables_protect)(sc_vm, sc_tables *, const sc_mapping *) noexcept nogil
        int (*tables_entry)(sc_vm, const sc_tables *, uint64_t, sc_entry *) noexcept nogil
        int (*tables_activate)(sc_vm, uint32_t, const sc_tables *) noexcept nogil
