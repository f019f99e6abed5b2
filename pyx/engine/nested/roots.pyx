"""The root of the host's tables: one for all vcpus, of which no load of a register makes another."""
from shadowcore.engine.bits cimport PTE_P
from shadowcore.engine.flushes cimport FLUSH_ZAP, request_flush
from shadowcore.engine.memory cimport mem_pool_hpa
from shadowcore.engine.nested.tables cimport host_role, table_free, table_take, tree_clear
from shadowcore.engine.pool cimport pool_find
from shadowcore.engine.record cimport RECORD_ALL_ZAPPED, record
from shadowcore.engine.role cimport role_invalid
from shadowcore.engine.state cimport (
    REQUEST_GUEST, REQUEST_OBSOLETE, REQUEST_ROOTS, REQUEST_SYNC, SLOT_ADDED, memo_drop, sc_mmu, sc_vcpu, vcpu_request,
)
from shadowcore.engine.types cimport MODE_OFF, SC_NONE, u32, u64
from shadowcore.engine.unsync.roots cimport flush_requested, make_room, page_get
from shadowcore.engine.zap cimport generation_next, root_let_go, slot_changes, zap_all, zap_commit


cdef u32 root_role(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil:
    return host_role(mmu.host_levels)


cdef bint root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil:
    gfn[0] = 0
    direct[0] = True
    return slot == 0


cdef u32 child_get(sc_mmu *mmu, const sc_vcpu *v, u64 gfn, int level) noexcept nogil:
    """The table of `level` for what lies from `gfn` on: found, or made; SC_NONE if no page is free."""
    return table_take(mmu, gfn, level) if mmu.tdp else page_get(mmu, v, gfn, host_role(level))


cdef bint _load(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Put the root in place; False if there is no page for it."""
    cdef u32 page
    if mmu.tdp:
        page = pool_find(mmu, 0, host_role(mmu.host_levels))
        if page == SC_NONE:
            page = table_take(mmu, 0, mmu.host_levels)
    else:
        make_room(mmu, 1)
        page = page_get(mmu, v, 0, host_role(mmu.host_levels))
    if page == SC_NONE:
        return False
    mmu.pages[page].root_count += 1
    mmu.stats.root_loads += 1
    v.roots[0] = page
    v.root_cr3 = 0 if v.guest.mode == MODE_OFF else v.cr3
    v.loaded = True
    memo_drop(mmu)
    return True


cdef void let_go(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """The direct MMU: v holds the root no more, and looks it up before its guest goes on. (The TDP MMU keeps its root
    until memory slots go.)"""
    if v.loaded:
        root_let_go(mmu, v.roots[0])
        v.roots[0] = SC_NONE
        v.loaded = False
        memo_drop(mmu)
        zap_commit(mmu, False)
    vcpu_request(v, REQUEST_ROOTS)


cdef void enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """All that is requested, until nothing is; then the processor has its root."""
    cdef u32 slot
    while v.requests:
        if v.requests & REQUEST_OBSOLETE:
            v.requests &= ~<u32>REQUEST_OBSOLETE
            if v.loaded and role_invalid(mmu.pages[v.roots[0]].role):
                let_go(mmu, v)
        v.requests &= ~<u32>REQUEST_SYNC
        flush_requested(mmu, v)
        if v.requests & REQUEST_GUEST:
            v.requests &= ~<u32>REQUEST_GUEST
            mmu.stats.tlb_flush += 1
        if not v.loaded:
            vcpu_request(v, REQUEST_ROOTS)
            if not _load(mmu, v):
                break               # the fault that comes will say so
        v.requests &= ~<u32>REQUEST_ROOTS
    for slot in range(4):
        v.hw.pdpte[slot] = 0 if v.roots[slot] == SC_NONE else mem_pool_hpa(v.roots[slot]) | PTE_P
    v.hw.root = v.guest.host_root = 0 if v.roots[0] == SC_NONE else mem_pool_hpa(v.roots[0])


cdef void slots_change(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil:
    """A memory slot that goes, or moves, takes all tables along, the root as well."""
    cdef u32 i, root
    if not mmu.tdp:
        slot_changes(mmu, what, gfn, n)
        return
    if what == SLOT_ADDED:
        return
    generation_next(mmu)
    record(mmu, RECORD_ALL_ZAPPED, 0, mmu.valid_gen, 0)
    mmu.valid_gen ^= 1
    tree_clear(mmu)
    root = pool_find(mmu, 0, host_role(mmu.host_levels))
    if root == SC_NONE:
        return
    for i in range(mmu.n_vcpus):
        if mmu.vcpus[i].loaded:
            mmu.vcpus[i].loaded = False
            mmu.vcpus[i].roots[0] = SC_NONE
            mmu.vcpus[i].hw.pdpte[0] = 0
        vcpu_request(mmu.vcpus[i], REQUEST_ROOTS)
    mmu.pages[root].root_count = 0
    table_free(mmu, root)
    memo_drop(mmu)
    mmu.flush_epoch += 1            # the load of another root flushes, and KVM does not count it


cdef void zap_tables(sc_mmu *mmu) noexcept nogil:
    """Every table goes, but for the root of the TDP MMU, which stays, empty."""
    if not mmu.tdp:
        zap_all(mmu)
        return
    tree_clear(mmu)
    request_flush(mmu, FLUSH_ZAP)
