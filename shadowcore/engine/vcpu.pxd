"""A virtual processor: accesses one by one or in batches."""
from shadowcore.engine.access cimport sc_op, sc_result
from shadowcore.engine.batch cimport sc_columns, sc_columns_out
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.invariants cimport sc_audit, sc_finding
from shadowcore.engine.memory cimport sc_mem, sc_slot
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.page cimport sc_frame, sc_link, sc_page
from shadowcore.engine.state cimport (
    sc_design, sc_event, sc_event_ring, sc_exit, sc_exit_log, sc_loaded, sc_mmu, sc_policy, sc_prev, sc_reference,
    sc_room, sc_vcpu, sc_walk_log,
)
from shadowcore.engine.tlb cimport sc_tlb, sc_tlb_bank, sc_tlb_entry
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_paging, sc_walk

cdef class VCpu:
    cdef sc_vcpu *c                 # its own; outside of the object, as that of Mmu
    cdef readonly Mmu mmu
    cdef object _tlb                # arrays behind c.tlb
    cdef object _tags               # ... and of what is made of them
    cdef object _memo               # array behind c.memo

    cdef Mmu _idle(self)
    cdef _make_bank(self, sc_tlb_bank *b, row)
    cdef int _access(self, u32 op, object gva, object size, object user, object value, object expected,
                     sc_result *r) except -1

# The structures behind a VM and its vcpu, whoever asks.
cdef sc_mmu *vm_mmu(object vm) except NULL
cdef sc_vcpu *vm_vcpu(object vm, u32 number) except NULL

# Modules of other packages are compiled with the structures of these headers. So those that were compiled with others
# are told, the two functions below are inline: sizes within them are those of the module that uses them.
cdef enum:
    SC_SHARED = 30

cdef struct sc_shared:              # this one stays as it is
    const char *name                # of a structure of a published header
    size_t size                     # its bytes

cdef int shared_check(const sc_shared *theirs, u32 n) except -1

cdef inline void shared_sizes(sc_shared *s) noexcept nogil:
    """All SC_SHARED of them. A new one goes to the end."""
    s[0].name, s[0].size = "sc_mmu", sizeof(sc_mmu)
    s[1].name, s[1].size = "sc_vcpu", sizeof(sc_vcpu)
    s[2].name, s[2].size = "sc_walk", sizeof(sc_walk)
    s[3].name, s[3].size = "sc_op", sizeof(sc_op)
    s[4].name, s[4].size = "sc_result", sizeof(sc_result)
    s[5].name, s[5].size = "sc_paging", sizeof(sc_paging)
    s[6].name, s[6].size = "sc_slot", sizeof(sc_slot)
    s[7].name, s[7].size = "sc_mem", sizeof(sc_mem)
    s[8].name, s[8].size = "sc_stats", sizeof(sc_stats)
    s[9].name, s[9].size = "sc_page", sizeof(sc_page)
    s[10].name, s[10].size = "sc_frame", sizeof(sc_frame)
    s[11].name, s[11].size = "sc_link", sizeof(sc_link)
    s[12].name, s[12].size = "sc_tlb_entry", sizeof(sc_tlb_entry)
    s[13].name, s[13].size = "sc_tlb", sizeof(sc_tlb)
    s[14].name, s[14].size = "sc_columns", sizeof(sc_columns)
    s[15].name, s[15].size = "sc_columns_out", sizeof(sc_columns_out)
    s[16].name, s[16].size = "sc_finding", sizeof(sc_finding)
    s[17].name, s[17].size = "sc_audit", sizeof(sc_audit)
    s[18].name, s[18].size = "sc_design", sizeof(sc_design)
    s[19].name, s[19].size = "sc_policy", sizeof(sc_policy)
    s[20].name, s[20].size = "sc_prev", sizeof(sc_prev)
    s[21].name, s[21].size = "sc_loaded", sizeof(sc_loaded)
    s[22].name, s[22].size = "sc_event", sizeof(sc_event)
    s[23].name, s[23].size = "sc_event_ring", sizeof(sc_event_ring)
    s[24].name, s[24].size = "sc_tlb_bank", sizeof(sc_tlb_bank)
    s[25].name, s[25].size = "sc_reference", sizeof(sc_reference)
    s[26].name, s[26].size = "sc_walk_log", sizeof(sc_walk_log)
    s[27].name, s[27].size = "sc_room", sizeof(sc_room)
    s[28].name, s[28].size = "sc_exit", sizeof(sc_exit)
    s[29].name, s[29].size = "sc_exit_log", sizeof(sc_exit_log)

cdef inline sc_mmu *mmu_struct(object vm) except NULL:
    """The structure behind a VM, for other packages; good for as long as the VM lives. TypeError for anything else,
    ImportError if the module that asks was compiled with structures of other sizes."""
    cdef sc_shared sizes[SC_SHARED]
    shared_sizes(sizes)
    shared_check(sizes, SC_SHARED)
    return vm_mmu(vm)

cdef inline sc_vcpu *vcpu_struct(object vm, u32 number) except NULL:
    """That of its vcpu of this number; ConfigError if there is none."""
    cdef sc_shared sizes[SC_SHARED]
    shared_sizes(sizes)
    shared_check(sizes, SC_SHARED)
    return vm_vcpu(vm, number)
