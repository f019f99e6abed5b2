"""Design `nested`: hardware translates twice, by the guest's tables and by the host's (EPT, NPT).

Nothing of the guest's tables is shadowed: stores to them, CR3 loads, INVLPG and page faults do not exit. The host's
tables are filled by exits of their own. Settings' defaults are those of Linux 6.1, which is followed event by event.
engine/nested has its tables, roots, logs and faults.
"""
from shadowcore.engine.bits cimport CR0_WP, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_SMEP, cr0_pg
from shadowcore.engine.counters cimport EXIT_CR0, EXIT_CR4, EXIT_EFER
from shadowcore.engine.lagging cimport LAGGING, lagging_audit
from shadowcore.engine.nested.faults cimport host_fault
from shadowcore.engine.nested.logs cimport log_cleared, log_stopped, slot_protect
from shadowcore.engine.nested.roots cimport enter, let_go, root_of, root_role, slots_change, zap_tables
from shadowcore.engine.nested.tables cimport tree_withdraw
from shadowcore.engine.state cimport (
    REQUEST_CURRENT, REQUEST_GUEST, REQUEST_ROOTS, memo_drop, sc_loaded, sc_mmu, sc_vcpu, vcpu_request,
)
from shadowcore.engine.types cimport MODE_64, MODE_LA57, MODE_OFF, MODE_PAE, u64
from shadowcore.engine.unsync.roots cimport role_changes
from shadowcore.engine.zap cimport frames_withdraw, generation_next


cdef void _begin(sc_mmu *mmu) noexcept nogil:
    """Between batches anybody may have written to the tables that translations were made of."""
    memo_drop(mmu)


cdef void _of_registers(sc_vcpu *v) noexcept nogil:
    """What walks need to know beside vcpu_apply's: PAE root entries are touched where CR3 says."""
    if v.guest.mode == MODE_PAE:
        v.guest.root = v.cr3 & 0xFFFFFFE0U
    v.root_cr3 = 0 if v.guest.mode == MODE_OFF else v.cr3


cdef void _processor(sc_vcpu *v) noexcept nogil:
    """The host's tables are of one mode, whatever the guest's are."""
    v.hw.mode = MODE_LA57 if v.guest.host_top == 5 else MODE_64
    _of_registers(v)


cdef void _reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """CR0, CR4 or EFER was loaded: an exit. The direct MMU looks up its root where a shadow's role would change."""
    cdef u64 cr0, cr4, efer
    v.guest.host_top = mmu.host_levels
    _processor(v)
    if before == NULL:
        if mmu.pages != NULL:       # else a machine that has registers alone
            vcpu_request(v, REQUEST_ROOTS)
        return
    mmu.stats.insn_emulation += 1
    cr0 = v.cr0 ^ before.cr0
    cr4 = v.cr4 ^ before.cr4
    efer = v.efer ^ before.efer
    if cr0 & cr0_pg() and not v.cr0 & cr0_pg():
        vcpu_request(v, REQUEST_GUEST)
    if cr0 == CR0_WP:
        cr0 = 0                     # alone, it does not count
    if role_changes(v, cr0, cr4, efer) and not mmu.tdp:
        let_go(mmu, v)
    if cr4 & CR4_PGE or (cr4 & CR4_PCIDE and not v.cr4 & CR4_PCIDE):
        vcpu_request(v, REQUEST_GUEST)
    elif cr4 & CR4_PAE or cr4 & v.cr4 & CR4_SMEP:
        vcpu_request(v, REQUEST_CURRENT)
    vcpu_request(v, REQUEST_ROOTS)
    enter(mmu, v)


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    _of_registers(v)


cdef bint _unprotect(sc_mmu *mmu, u64 gfn) noexcept nogil:
    return False


cdef bint _withdraw(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil:
    return tree_withdraw(mmu, frame, n) if mmu.tdp else frames_withdraw(mmu, frame, n)


cdef void nested_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design."""
    mmu.nested = True
    mmu.lists_all = True
    mmu.deferred = True
    mmu.design.exits = 1 << EXIT_CR0 | 1 << EXIT_CR4 | 1 << EXIT_EFER
    mmu.design.invariants = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 13 | LAGGING
    mmu.design.begin = _begin
    mmu.design.new_cr3 = _new_cr3
    mmu.design.reset = _reset
    mmu.design.root_of = root_of
    mmu.design.host_fault = host_fault
    mmu.design.enter = enter
    mmu.design.audit = lagging_audit
    mmu.design.processor = _processor
    mmu.design.root_role = root_role
    mmu.design.unprotect = _unprotect
    mmu.design.zap_all = zap_tables
    mmu.design.protect_slot = slot_protect
    mmu.design.log_cleared = log_cleared
    mmu.design.log_stopped = log_stopped
    mmu.design.slot_changes = slots_change
    mmu.design.slot_changed = generation_next
    mmu.design.withdraw = _withdraw
