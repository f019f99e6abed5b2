"""The log of exits: one row each, with what the MMU did about it.

It hears of exits as embedders do, and stands before hooks of the design to know where a page-fault exit begins. A
machine whose exits nobody logs runs without a trace of this.

What the counters have grown by belongs to the last exit, from the moment that it began until another begins, or what is
done is no longer the guest's (exits_close). What a vcpu puts off until it enters its guest again (sc_design.enter)
belongs to its own last exit.
"""
from libc.string cimport memset

from shadowcore.engine.counters cimport EXIT_INVLPG, EXIT_MMIO
from shadowcore.engine.fault cimport page_fault_usual
from shadowcore.engine.hooks cimport EVENT_EXIT
from shadowcore.engine.state cimport (
    CHANGE_FLOODED, CHANGE_FOUND, CHANGE_INSTALLED, CHANGE_MADE, CHANGE_RECYCLED, CHANGE_REMOVED, CHANGE_SYNCED,
    CHANGE_ZAPPED, CHANGES, SC_MAX_VCPUS, sc_exit, sc_exit_log, sc_mmu, sc_stats, sc_vcpu,
)
from shadowcore.engine.types cimport RC_EMULATE, RC_MMIO, RC_OK, RC_PF, RC_RETRY, u8, u32, u64
from shadowcore.engine.walker cimport sc_walk


cdef inline void _counters(const sc_stats *stats, u64 *now) noexcept nogil:
    now[CHANGE_MADE] = stats.mmu_cache_miss
    now[CHANGE_FOUND] = stats.mmu_cache_hit
    now[CHANGE_ZAPPED] = stats.mmu_shadow_zapped
    now[CHANGE_FLOODED] = stats.mmu_flooded
    now[CHANGE_RECYCLED] = stats.mmu_recycled
    now[CHANGE_SYNCED] = stats.synced
    now[CHANGE_INSTALLED] = stats.spte_installed
    now[CHANGE_REMOVED] = stats.spte_removed


cdef void _account(sc_mmu *mmu, u64 row) noexcept nogil:
    """What the counters have grown by belongs to row number `row`, if there is one, and is accounted for."""
    cdef sc_exit_log *log = mmu.exits
    cdef u64 now[CHANGES]
    cdef int i
    _counters(mmu.stats, now)
    for i in range(CHANGES):
        if row < log.room.size and row < log.room.count:
            log.exit[row].change[i] += <u32>(now[i] - log.seen[i])
        log.seen[i] = now[i]


cdef void exits_close(sc_mmu *mmu) noexcept nogil:
    _account(mmu, mmu.exits.room.count - 1 if mmu.exits.open else ~<u64>0)
    mmu.exits.open = False


cdef u64 _begun(const sc_exit_log *log) noexcept nogil:
    """Operations begun, of those that a guest kernel counts."""
    cdef u64 begun = 0
    cdef int i
    for i in range(4):
        if log.counts[i] != NULL:
            begun += log.counts[i][0]
    return begun


cdef u64 _number(const sc_exit_log *log, u32 reason) noexcept nogil:
    """Number of the operation under way. A guest kernel counts accesses and INVLPG before it makes them, loads of CR3
    afterwards."""
    cdef bint counted = log.counts[0] != NULL and (reason <= EXIT_MMIO or reason == EXIT_INVLPG)
    return log.operation + _begun(log) - counted


cdef void _logged(sc_mmu *mmu, u32 reason, u32 vcpu, u64 address) noexcept nogil:
    cdef sc_exit_log *log = mmu.exits
    cdef sc_exit *e
    if log.open or not log.inside:
        exits_close(mmu)
    if log.room.count == log.room.size and log.grow != NULL:
        log.grow(log.owner)
    if log.room.count < log.room.size:
        e = &log.exit[log.room.count]
        memset(e, 0, sizeof(sc_exit))
        e.operation = _number(log, reason)
        e.gva = address
        e.gfn = ~<u64>0
        e.vcpu = <u8>vcpu
        e.reason = <u8>reason
    if vcpu < SC_MAX_VCPUS:
        log.last[vcpu] = log.room.count
    log.room.count += 1
    log.open = True


cdef void _event(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil:
    if kind == EVENT_EXIT:
        _logged(mmu, detail, vcpu, address)
    if mmu.told_events >> kind & 1:
        mmu.told(mmu, kind, detail, vcpu, address)


cdef void _settled(sc_mmu *mmu) noexcept nogil:
    mmu.events = mmu.told_events
    mmu.event = mmu.told
    if mmu.exits != NULL:
        mmu.events |= 1 << EVENT_EXIT
        mmu.event = _event


cdef void events_tell(sc_mmu *mmu, u32 events, sc_event_hook told, void *context) noexcept nogil:
    mmu.told_events = events
    mmu.told = told
    mmu.event_context = context
    _settled(mmu)


cdef inline u64 _begin(sc_mmu *mmu) noexcept nogil:
    """A page-fault exit begins: how many there were."""
    exits_close(mmu)
    mmu.exits.inside = True
    return mmu.exits.room.count


cdef inline void _end(sc_mmu *mmu, u64 before, u64 gfn, u64 code) noexcept nogil:
    """It is over, but for an emulated store. before: what _begin said."""
    cdef sc_exit_log *log = mmu.exits
    log.inside = False
    if before < log.room.count and before < log.room.size:
        log.exit[before].gfn = gfn
        log.exit[before].error_code = code


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    cdef u64 before = _begin(mmu)
    cdef u64 code = hw.error_code
    cdef int rc
    if mmu.exits.below.page_fault != NULL:
        rc = mmu.exits.below.page_fault(mmu, v, access, hw, w)
    else:
        rc = page_fault_usual(mmu, v, access, hw, w)
    if rc == RC_PF:
        _end(mmu, before, ~<u64>0, w.error_code)
    elif rc == RC_OK or rc == RC_RETRY or rc == RC_EMULATE or rc == RC_MMIO:
        _end(mmu, before, w.gpa >> 12, code)
    else:
        _end(mmu, before, ~<u64>0, code)
    return rc


cdef int _host_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    cdef u64 before = _begin(mmu)
    cdef u64 gfn = w.refused_gpa >> 12
    cdef u64 code = w.refused_code
    cdef int rc = mmu.exits.below.host_fault(mmu, v, va, access, w)
    _end(mmu, before, gfn, code)
    return rc


cdef u64 _fast_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    """None is: the general way does the same."""
    told[0] = 0
    return ~<u64>0


cdef void _enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    if mmu.exits.inside:
        mmu.exits.below.enter(mmu, v)
        return
    exits_close(mmu)
    mmu.exits.below.enter(mmu, v)
    _account(mmu, mmu.exits.last[v.number])


cdef void exits_taken(sc_mmu *mmu) noexcept nogil:
    memset(mmu.exits.last, 0xFF, sizeof(mmu.exits.last))


cdef void exits_follow(sc_mmu *mmu, sc_exit_log *log, u64 first) noexcept nogil:
    log.below = mmu.design
    log.open = log.inside = False
    memset(log.counts, 0, sizeof(log.counts))
    log.operation = first
    _counters(mmu.stats, log.seen)
    mmu.exits = log
    exits_taken(mmu)
    if mmu.design.fast_fault != NULL:
        mmu.design.fast_fault = _fast_fault
    if mmu.design.host_fault != NULL:
        mmu.design.host_fault = _host_fault
    if mmu.design.enter != NULL:
        mmu.design.enter = _enter
    mmu.design.page_fault = _page_fault
    _settled(mmu)


cdef void exits_leave(sc_mmu *mmu) noexcept nogil:
    cdef sc_exit_log *log = mmu.exits
    if log == NULL:
        return
    exits_close(mmu)
    mmu.design.fast_fault = log.below.fast_fault
    mmu.design.host_fault = log.below.host_fault
    mmu.design.enter = log.below.enter
    mmu.design.page_fault = log.below.page_fault
    mmu.exits = NULL
    _settled(mmu)


cdef void exits_counted(sc_mmu *mmu, const u64 *accesses, const u64 *kernel_accesses, const u64 *cr3_loads,
                        const u64 *invlpg) noexcept nogil:
    cdef sc_exit_log *log = mmu.exits
    if log == NULL:
        return
    exits_close(mmu)
    log.operation += _begun(log)
    log.counts[0], log.counts[1], log.counts[2], log.counts[3] = accesses, kernel_accesses, cr3_loads, invlpg
    log.operation -= _begun(log)
