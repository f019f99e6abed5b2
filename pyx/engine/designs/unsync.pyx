"""Design `unsync`: the shadow MMU of today's Linux.

Leaf tables of the guest leave sync at the first store to them and lag until the guest flushes; tables above are
write-protected, and stores to them emulated. Roots of earlier CR3s are kept. Leaves may be large where the guest's page
and the host's are. Settings' defaults are those of Linux 6.1, which is followed event by event; what it does against
the architecture is a quirk (config.Quirk). engine/unsync has its roots, faults and stores.
"""
from shadowcore.engine.bits cimport (
    CR0_WP, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_SMEP, EFER_LMA, PTE_P, PTE_PS, cr0_pg, level_index,
)
from shadowcore.engine.counters cimport EXIT_CR0, EXIT_CR3, EXIT_CR4, EXIT_EFER, EXIT_INVLPG
from shadowcore.engine.fast cimport fault_fast_lagging
from shadowcore.engine.lagging cimport LAGGING, lagging_audit
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_pool_page
from shadowcore.engine.quirks cimport QUIRK_FAULT_KEEPS_LEAF, QUIRK_TAGGED_CR3_LAGS
from shadowcore.engine.role cimport role_direct, role_level
from shadowcore.engine.state cimport (
    REQUEST_CURRENT, REQUEST_FLUSH, REQUEST_GUEST, REQUEST_ROOTS, REQUEST_SYNC, linear_exists, memo_drop, sc_loaded,
    sc_mmu, sc_prev, sc_vcpu, vcpu_pcid, vcpu_request,
)
from shadowcore.engine.sync cimport leaf_refetch
from shadowcore.engine.tlb cimport INVPCID_ADDRESS, INVPCID_CONTEXT
from shadowcore.engine.types cimport MODE_64, MODE_OFF, MODE_PAE, PF_P, PF_RSVD, SC_NONE, u16, u32, u64
from shadowcore.engine.unsync.faults cimport page_fault
from shadowcore.engine.unsync.logs cimport log_cleared, log_stopped, slot_protect
from shadowcore.engine.unsync.roots cimport (
    enter, every_earlier, forget_device, let_go, role_changes, root_at, root_of, root_role,
)
from shadowcore.engine.unsync.stores cimport other_instruction, run_again, stored
from shadowcore.engine.walker cimport paging_refused, paging_reserved, sc_walk
from shadowcore.engine.zap cimport frames_withdraw, generation_next, slot_changes, zap_all, zap_gfn


cdef void _processor(sc_vcpu *v) noexcept nogil:
    """What the processor walks the shadow with: no-execute always counts; large leaves may be met; with paging off what
    asks who owns a page is off as well."""
    v.hw.nxe = True
    v.hw.fetch_coded = True
    v.hw.smep = v.guest.smep and v.guest.mode != MODE_OFF
    v.hw.smap = v.guest.smap and v.guest.mode != MODE_OFF
    v.hw.mode = MODE_64
    paging_reserved(&v.hw, 52, True, False, False)
    v.hw.mode = v.guest.mode if v.guest.mode >= MODE_64 else MODE_PAE
    paging_refused(&v.hw)


cdef void _reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """CR0, CR4 or EFER was loaded. A bit of a role changes: all roots are let go."""
    cdef u64 cr0, cr4, efer
    _processor(v)
    if before == NULL:
        v.retried = False
        if mmu.pages != NULL:       # else a machine that has registers alone
            let_go(mmu, v, every_earlier(mmu), True)
            vcpu_request(v, REQUEST_ROOTS if mmu.rewrites else REQUEST_ROOTS | REQUEST_FLUSH)
        return
    mmu.stats.insn_emulation += 1
    cr0 = v.cr0 ^ before.cr0
    cr4 = v.cr4 ^ before.cr4
    efer = v.efer ^ before.efer
    if not efer & ~<u64>EFER_LMA:
        other_instruction(mmu, v)      # a load of EFER is skipped, not emulated
    if before.pdptes:
        let_go(mmu, v, 0, True)
    if cr0 & cr0_pg() and not v.cr0 & cr0_pg():
        vcpu_request(v, REQUEST_GUEST)
    if cr0 == CR0_WP and not v.cr0 & cr0_pg() and not mmu.rewrites:
        cr0 = 0                     # 6.12: with paging off, no role asks
    if role_changes(v, cr0, cr4, efer):
        let_go(mmu, v, every_earlier(mmu), True)
    if cr4 & CR4_PGE or (cr4 & CR4_PCIDE and not v.cr4 & CR4_PCIDE):
        vcpu_request(v, REQUEST_GUEST)
    elif cr4 & CR4_PAE or cr4 & v.cr4 & CR4_SMEP:
        vcpu_request(v, REQUEST_CURRENT)
    vcpu_request(v, REQUEST_ROOTS)
    enter(mmu, v)


cdef bint _usable(const sc_mmu *mmu, const sc_vcpu *v, u32 page, u64 cr3) noexcept nogil:
    return page != SC_NONE and cr3 == v.cr3 and mmu.pages[page].role == root_role(mmu, v, 0)


cdef bint _exchange_roots(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """A root of an earlier CR3 serves for this one. The present one becomes the first of the earlier ones, the last of
    which goes if none serves."""
    cdef sc_prev current = sc_prev(v.root_cr3, v.roots[0], 0)
    cdef sc_prev swapped
    cdef u32 i
    cdef u32 k
    if v.loaded:
        for i in range(mmu.prev_roots):
            swapped = v.prev[i]
            v.prev[i] = current
            current = swapped
            if _usable(mmu, v, current.page, current.cr3):
                break
        else:
            v.roots[0] = current.page
            v.loaded = current.page != SC_NONE
            return False
    else:
        for i in range(mmu.prev_roots):
            if _usable(mmu, v, v.prev[i].page, v.prev[i].cr3):
                break
        else:
            return False
        current = v.prev[i]
        for k in range(i, mmu.prev_roots - 1):
            v.prev[k] = v.prev[k + 1]
        v.prev[mmu.prev_roots - 1] = sc_prev(0, SC_NONE, 0)
    v.roots[0] = current.page
    v.root_cr3 = current.cr3
    v.loaded = True
    mmu.stats.prev_root_hits += 1
    return True


cdef void _other_cr3(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """The roots for a CR3 that was not the last one."""
    if v.guest.mode < MODE_64:
        let_go(mmu, v, 0, True)
    elif not _exchange_roots(mmu, v):
        let_go(mmu, v, 0, True)
    else:
        memo_drop(mmu)
        vcpu_request(v, REQUEST_ROOTS)
        forget_device(v)
        mmu.pages[v.roots[0]].flood = 0


cdef void _invalidate_pcid(sc_mmu *mmu, sc_vcpu *v, u16 pcid) noexcept nogil:
    """What was cached under a PCID goes, but for global entries: the present root is synced, earlier ones let go."""
    cdef u32 i
    cdef u32 earlier = 0
    if pcid == vcpu_pcid(v):
        vcpu_request(v, REQUEST_SYNC | REQUEST_CURRENT)
    if v.cr4 & CR4_PCIDE:
        for i in range(mmu.prev_roots):
            if v.prev[i].page != SC_NONE and (v.prev[i].cr3 ^ pcid) & 0xFFF == 0:
                earlier |= <u32>1 << i
        let_go(mmu, v, earlier, False)


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """CR3 was loaded: a flush, too, unless bit 63 said no."""
    mmu.stats.insn_emulation += 1
    other_instruction(mmu, v)
    if before == NULL:
        let_go(mmu, v, every_earlier(mmu), True)
    else:
        if before.pdptes:
            let_go(mmu, v, 0, True)
        if v.cr3 != before.cr3:
            _other_cr3(mmu, v)
    if before == NULL or not before.tagged:
        _invalidate_pcid(mmu, v, vcpu_pcid(v))
    elif v.cr3 != before.cr3 and not mmu.quirks & QUIRK_TAGGED_CR3_LAGS:
        vcpu_request(v, REQUEST_SYNC)
    enter(mmu, v)


cdef void _invlpg_root(sc_mmu *mmu, sc_vcpu *v, u32 page, u64 va) noexcept nogil:
    """Of one root: the leaf for va, if its page is unsync; 2.6.28: in any case."""
    cdef u32 spte
    cdef int level
    cdef u64 value
    if v.device_va == va & ~<u64>4095:
        forget_device(v)
    while page != SC_NONE:
        level = role_level(mmu.pages[page].role)
        spte = page * 512 + level_index(va, level)
        value = mmu.table[spte]
        if level == 1 or (value & PTE_P and value & PTE_PS):
            if mmu.pages[page].unsync or mmu.one_role:
                leaf_refetch(mmu, v, spte)
            return
        if not (mmu.pages[page].unsync_children or mmu.one_role) or not value & PTE_P:
            return
        page = mem_pool_page(value)


cdef void _invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """The present roots and the earlier ones."""
    cdef u32 i
    mmu.stats.insn_emulation += 1
    other_instruction(mmu, v)
    if v.guest.mode != MODE_OFF and linear_exists(v, va):
        _invlpg_root(mmu, v, root_at(v, va), va)
        for i in range(mmu.prev_roots):
            if v.prev[i].page != SC_NONE:
                _invlpg_root(mmu, v, v.prev[i].page, va)
    enter(mmu, v)


cdef void _invpcid(sc_mmu *mmu, sc_vcpu *v, u32 kind, u16 pcid, u64 va) noexcept nogil:
    """Of one address: the roots of that PCID, as INVLPG, among which it is counted."""
    cdef u32 i
    if kind == INVPCID_CONTEXT:
        _invalidate_pcid(mmu, v, pcid)
    elif kind != INVPCID_ADDRESS:
        vcpu_request(v, REQUEST_GUEST)
    else:
        mmu.stats.invlpg += 1
        if v.guest.mode != MODE_OFF:
            if pcid == vcpu_pcid(v):
                _invlpg_root(mmu, v, root_at(v, va), va)
            for i in range(mmu.prev_roots):
                if v.prev[i].page != SC_NONE and (v.prev[i].cr3 & 0xFFF if v.cr4 & CR4_PCIDE else 0) == pcid:
                    _invlpg_root(mmu, v, v.prev[i].page, va)
    enter(mmu, v)


cdef bint _guest_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """A #PF is an INVLPG of the present root; with the quirk, one with P set and no reserved bit."""
    if mmu.quirks & QUIRK_FAULT_KEEPS_LEAF and code & (PF_P | PF_RSVD) != PF_P:
        return False
    if v.guest.mode != MODE_OFF and linear_exists(v, va):
        _invlpg_root(mmu, v, root_at(v, va), va)
        return True
    return False


cdef int _guest_level(const sc_mmu *mmu, const sc_walk *w) noexcept nogil:
    """A large leaf, or direct pages, stand for a large page."""
    cdef int level = w.level
    while level < 3 and role_direct(mmu.pages[w.table[level] - SC_POOL_HFN].role):
        level += 1
    return level


cdef void unsync_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design."""
    mmu.shadow = True
    mmu.by_table = True
    mmu.lists_all = True
    mmu.deferred = True
    mmu.design.exits = 1 << EXIT_CR0 | 1 << EXIT_CR3 | 1 << EXIT_CR4 | 1 << EXIT_EFER | 1 << EXIT_INVLPG
    mmu.design.invariants = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 13 | LAGGING
    mmu.design.new_cr3 = _new_cr3
    mmu.design.reset = _reset
    mmu.design.invlpg = _invlpg
    mmu.design.invpcid = _invpcid
    mmu.design.guest_fault = _guest_fault
    mmu.design.fast_fault = fault_fast_lagging
    mmu.design.root_of = root_of
    mmu.design.guest_level = _guest_level
    mmu.design.page_fault = page_fault
    mmu.design.stored = stored
    mmu.design.run_again = run_again
    mmu.design.enter = enter
    mmu.design.audit = lagging_audit
    mmu.design.processor = _processor
    mmu.design.root_role = root_role
    mmu.design.unprotect = zap_gfn
    mmu.design.zap_all = zap_all
    mmu.design.protect_slot = slot_protect
    mmu.design.log_cleared = log_cleared
    mmu.design.log_stopped = log_stopped
    mmu.design.slot_changes = slot_changes
    mmu.design.slot_changed = generation_next
    mmu.design.withdraw = frames_withdraw
