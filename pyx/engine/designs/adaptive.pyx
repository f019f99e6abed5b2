"""Design `adaptive`: `unsync`, in which each leaf table of the guest is kept in the way that costs least.

A table runs out of sync at a store (as under `unsync`), or has its stores emulated and leaves updated in place, or is
zapped at a store, so that the guest stores by itself until the table is used again. Which, is decided at the store, by
what the table's history comes to in cycles (history.pxd): of the way that it is kept in as measured, of the other as
estimated from the same events. The way changes when the difference has grown past a threshold, which doubles each time
that the change turns out to have been wrong. Tables above the leaves are as under `unsync`.

INVLPG need not leave the guest while nothing is out of sync, for then the shadow follows every store; so the exits are
a cost of running out of sync, and are counted as such.
"""
from shadowcore.engine.bits cimport PTE_A, PTE_P, PTE_PS, PTE_W, SPTE_GUEST_W, level_index
from shadowcore.engine.counters cimport EXIT_FILL, EXIT_INVLPG
from shadowcore.engine.designs.unsync cimport unsync_design
from shadowcore.engine.history cimport (
    KEPT_EMULATED, KEPT_UNSYNC, KEPT_ZAPPED, RULE_EMULATE, RULE_FREED, RULE_HYSTERESIS, RULE_INVLPG, RULE_ZAP,
    WHY_INVLPG, WHY_LONG, WHY_REFAULTS, WHY_SHORT, WHY_TRIAL, history_find, history_get, sc_histories, sc_history,
)
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.memory cimport mem_frame, mem_guest_frame, mem_may_write, mem_pool_page, sc_no_frame
from shadowcore.engine.path cimport path_find, sc_path
from shadowcore.engine.pool cimport hash_bucket, shadows
from shadowcore.engine.rmap cimport list_first, list_next
from shadowcore.engine.role cimport ROLE_QUADRANT, role_direct, role_field, role_level, role_pte_size
from shadowcore.engine.state cimport (
    LET_EMULATE, LET_UNSYNC, LET_ZAP, linear_exists, memo_drop, sc_loaded, sc_mmu, sc_vcpu,
)
from shadowcore.engine.sync cimport leaf_writable
from shadowcore.engine.tlb cimport INVPCID_ADDRESS
from shadowcore.engine.types cimport MODE_OFF, PF_W, SC_NONE, u8, u16, u32, u64
from shadowcore.engine.unsync.roots cimport enter, forget_device
from shadowcore.engine.walker cimport sc_walk
from shadowcore.engine.zap cimport zap_commit, zap_gfn, zap_prepare

cdef enum:
    DOUBTS = 6                      # doublings of the threshold at most
    FORGET = 7                      # after so many uses, as a power of two, what was measured once counts little
    CYCLES = 128                    # zaps after which a table is tried unsync again
    MANY = 0x7FFF                   # of what is counted in 16 bits
    CHILDREN = 8                    # pages that the entries for one store of the guest can lead to


cdef inline int _back(const sc_histories *h) noexcept nogil:
    """Cycles of difference after which a table runs out of sync again: a store and the fault after it, twice."""
    return 2 * (h.write + h.fill) if h.rules & RULE_HYSTERESIS else 0


cdef inline int _threshold(const sc_histories *h, const sc_history *e) noexcept nogil:
    """The same that makes it leave that way: doubled each time that this turned out to be wrong."""
    return _back(h) << min(e.doubts, DOUBTS)


cdef inline int _added(int balance, long long cycles, int low) noexcept nogil:
    """A balance goes no lower than `low`, so that what has long been right is not right for ever."""
    return <int>min(max(balance + cycles, <long long>low), <long long>1 << 29)


cdef void _change(sc_history *e, u8 kept, u8 why) noexcept nogil:
    e.kept = kept
    e.why = why
    e.balance = e.storm = 0
    e.cycles = e.fills_now = e.invlpgs_now = e.uses_now = 0
    e.last = e.group = SC_NONE
    e.changes = min(e.changes + 1, MANY)
    if why == WHY_LONG or why == WHY_REFAULTS:
        e.doubts = min(e.doubts + 1, DOUBTS)


cdef bint _maps_itself(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """The leaf that is being made is one of the table's own."""
    cdef const sc_histories *h = mmu.histories
    cdef sc_path path
    if not h.faulting:
        return False
    path_find(mmu, mmu.vcpus[h.vcpu], h.va, &path)
    return path.n > 0 and mmu.pages[path.page[path.n - 1]].gfn == gfn


cdef bint _stays_zapped(const sc_histories *h, sc_history *e) noexcept nogil:
    """A store to a table that is zapped at stores: it was made, and used, since the last one."""
    e.balance = _added(e.balance, h.write + h.page - <long long>e.worth, -_back(h))
    e.fills_now = 0
    e.cycles += 1
    if e.balance > _back(h):
        _change(e, KEPT_UNSYNC, WHY_REFAULTS)
    elif e.cycles >= CYCLES:
        _change(e, KEPT_UNSYNC, WHY_TRIAL)
    return e.kept == KEPT_ZAPPED


cdef bint _stays_unsync(const sc_histories *h, sc_history *e) noexcept nogil:
    """A store to a table that would go unsync. What the last time came to, and emulation would have: at least a store
    for each entry that was filled or made forget; and as much as it came to when it was tried."""
    cdef long long seen = max(e.fills_now, e.invlpgs_now)
    cdef long long paid = h.write + <long long>e.fills_now * h.fill + <long long>e.invlpgs_now * h.invlpg
    if e.unsyncs:
        e.balance = _added(e.balance, paid - max(max(seen, <long long>1) * h.emulate, <long long>e.worth), -_back(h))
        e.worth -= e.worth >> FORGET
        e.idle += seen == 0
    e.fills_now = e.invlpgs_now = e.uses_now = 0
    if h.rules & RULE_EMULATE and e.balance > _threshold(h, e):
        _change(e, KEPT_EMULATED, WHY_SHORT)
    return e.kept == KEPT_UNSYNC


cdef int _decide(void *decider, u64 gfn) noexcept nogil:
    """sc_mmu.may_unsync: a leaf that maps the leaf table at gfn is about to get W."""
    cdef sc_mmu *mmu = <sc_mmu *>decider
    cdef sc_histories *h = mmu.histories
    cdef sc_history *e = history_get(h, gfn)
    cdef bint storing = h.storing or not h.faulting
    cdef u32 i
    if e.kept == KEPT_ZAPPED:
        if not storing:
            return LET_EMULATE
        if _stays_zapped(h, e) and not _maps_itself(mmu, gfn):
            e.zaps += 1
            e.load = h.loads
            return LET_ZAP
    elif e.kept == KEPT_EMULATED:
        if e.balance > _back(h):
            e.worth = <u32>(<u64>e.cycles * <u64>h.emulate // max(e.uses_now, 1))
            _change(e, KEPT_UNSYNC, WHY_LONG)
        else:
            return LET_EMULATE
    elif storing and not _stays_unsync(h, e):
        return LET_EMULATE
    e.unsyncs += 1
    e.load = h.loads
    if mmu.stats.mmu_unsync == 0:   # INVLPG exits from now on, and what it would have made forget is forgotten
        for i in range(mmu.n_vcpus):
            forget_device(mmu.vcpus[i])
    return LET_UNSYNC


cdef void _filled(sc_mmu *mmu, const sc_vcpu *v, u64 va) noexcept nogil:
    """A fault for va has made a leaf."""
    cdef sc_histories *h = mmu.histories
    cdef sc_path path
    cdef sc_history *e
    path_find(mmu, v, va, &path)
    if path.n == 0 or role_level(mmu.pages[path.page[path.n - 1]].role) > 1:
        return
    e = history_find(h, mmu.pages[path.page[path.n - 1]].gfn)
    if e == NULL or role_direct(mmu.pages[path.page[path.n - 1]].role):
        return
    e.fills += 1
    e.fills_now = min(e.fills_now + 1, MANY)
    if e.kept == KEPT_ZAPPED:
        e.balance = _added(e.balance, h.fill, -_back(h))


cdef inline void _settled(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Devices are remembered only while INVLPG exits, which makes that forget."""
    if mmu.stats.mmu_unsync == 0 and mmu.histories.rules & RULE_INVLPG:
        forget_device(v)


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    cdef sc_histories *h = mmu.histories
    cdef u64 va = hw.va
    cdef u64 fills = mmu.stats.exits[EXIT_FILL]
    cdef int rc
    h.faulting = True
    h.storing = access & PF_W
    h.vcpu = v.number
    h.va = va
    _settled(mmu, v)
    rc = mmu.alone.page_fault(mmu, v, access, hw, w)
    h.faulting = False
    _settled(mmu, v)
    if mmu.stats.exits[EXIT_FILL] != fills:
        _filled(mmu, v, va)
    return rc


cdef u64 _fast_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    cdef u64 fixed = mmu.stats.pf_fixed
    cdef u64 gpa = mmu.alone.fast_fault(mmu, v, va, access, told)
    if mmu.stats.pf_fixed != fixed:
        _filled(mmu, v, va)
    return gpa


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    mmu.histories.loads += 1
    mmu.alone.new_cr3(mmu, v, before)


cdef u32 _entry_of(const sc_mmu *mmu, u64 gpa) noexcept nogil:
    """The entry of a shadow page in sync, of level 1, for the guest's entry at gpa; SC_NONE if there is none."""
    cdef u64 gfn = gpa >> 12
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef u32 size, entry
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and role_level(mmu.pages[number].role) == 1 and not mmu.pages[number].unsync:
            size = role_pte_size(mmu.pages[number].role)
            entry = <u32>(gpa & 4095) // size
            if size == 8 or entry >> 9 == role_field(mmu.pages[number].role, ROLE_QUADRANT, 3):
                return number * 512 + (entry & 511)
        number = mmu.pages[number].hash_next
    return SC_NONE


cdef void _emulated(const sc_mmu *mmu, const sc_histories *h, sc_history *e, u32 spte) noexcept nogil:
    """A store to a leaf table that is kept so. Unsync, the first after a load of CR3 would have been an exit; and so
    would the use of the entry that the store before made, which now had a leaf at once; but for those that the same
    fault would have filled."""
    cdef int cycles = h.emulate
    cdef u32 group = max(mmu.prefetch, 1)
    e.cycles = min(e.cycles + 1, MANY)
    if e.load != h.loads:
        cycles -= h.write
        e.uses_now = min(e.uses_now + 1, MANY)
    if e.absent and e.last < mmu.pool_pages * 512 and mmu.table[e.last] & (PTE_P | PTE_A) == (PTE_P | PTE_A):
        if e.last // group != e.group:
            cycles -= h.fill
        e.group = e.last // group
    e.balance = _added(e.balance, cycles, -_back(h))
    e.last = spte
    e.absent = not mmu.table[spte] & PTE_P
    e.load = h.loads


cdef int _linked(const sc_mmu *mmu, u64 gpa, u32 *child) noexcept nogil:
    """The pages that shadow entries for the guest's entry at gpa lead to, where its table is above the leaves."""
    cdef u64 gfn = gpa >> 12
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef u32 i, n, index
    cdef int found = 0
    cdef u64 value
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and role_level(mmu.pages[number].role) > 1:
            n = 8 // role_pte_size(mmu.pages[number].role)          # sptes for an entry
            index = (<u32>(gpa & 4095) // role_pte_size(mmu.pages[number].role)) * n
            for i in range(n):
                value = mmu.table[number * 512 + ((index + i) & 511)]
                if value & PTE_P and not value & PTE_PS and found < CHILDREN:
                    child[found] = mem_pool_page(value)
                    found += 1
        number = mmu.pages[number].hash_next
    return found


cdef bint _is_empty(const sc_mmu *mmu, u64 gfn, int pte_size) noexcept nogil:
    """No entry of the guest's table is present."""
    cdef u64 present = PTE_P if pte_size == 8 else (<u64>PTE_P << 32 | PTE_P)
    cdef const u64 *table
    cdef int i
    if mem_frame(mmu.mem, gfn) == sc_no_frame():
        return False
    table = <const u64 *>mem_guest_frame(mmu.mem, gfn << 12)
    for i in range(512):
        if table[i] & present:
            return False
    return True


cdef void _grant(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """What shadowed the table at gfn is gone: leaves that map it get W back, where the guest's entries grant it and
    nobody else is to see the first store."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u32 member
    if (mmu.frames[frame].shadowed or mmu.mem.logging or mmu.mem.special or mmu.ring != NULL
            or not mem_may_write(mmu.mem, gfn, frame)):
        return
    member = list_first(mmu.frames[frame].rmap)
    while member:
        if mmu.table[member - 1] & (SPTE_GUEST_W | PTE_W) == SPTE_GUEST_W:
            mmu.table[member - 1] |= leaf_writable()
        member = list_next(mmu, mmu.frames[frame].rmap, member)
    memo_drop(mmu)


cdef void _freed(sc_mmu *mmu, u32 page) noexcept nogil:
    """An emulated store may have unlinked the page. One that nothing leads to, of a table without entries, shadows a
    frame that the guest has freed, or is about to: what it stores there next needs no exit."""
    cdef u64 gfn = mmu.pages[page].gfn
    cdef bint ignored = False
    if (not mmu.pages[page].active or mmu.pages[page].parents or mmu.pages[page].root_count
            or role_direct(mmu.pages[page].role)
            or not _is_empty(mmu, gfn, role_pte_size(mmu.pages[page].role))):
        return
    zap_prepare(mmu, page, &ignored)
    zap_commit(mmu, False)
    _grant(mmu, gfn)


cdef void _stored(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil:
    cdef u32 child[CHILDREN]
    cdef int n = 0
    cdef int i
    cdef sc_histories *h = mmu.histories
    cdef sc_history *e
    cdef u64 flooded = mmu.stats.mmu_flooded
    cdef u32 spte
    if v == NULL:
        mmu.alone.stored(mmu, v, gpa, nbytes)
        return
    e = history_get(h, gpa >> 12)
    e.stores += 1
    spte = _entry_of(mmu, gpa)
    if spte != SC_NONE and e.kept == KEPT_EMULATED:
        _emulated(mmu, h, e, spte)
    e.load = h.loads
    if h.rules & RULE_FREED:
        n = _linked(mmu, gpa, child)
    mmu.alone.stored(mmu, v, gpa, nbytes)
    for i in range(n):
        _freed(mmu, child[i])
    e.zaps += mmu.stats.mmu_flooded != flooded


cdef int _accessed(const sc_mmu *mmu, u32 page) noexcept nogil:
    """Groups of entries, as a fault fills them, with a leaf that was used."""
    cdef u32 group = max(mmu.prefetch, 1)
    cdef u32 last = SC_NONE
    cdef int found = 0
    cdef u32 i
    for i in range(512):
        if mmu.table[page * 512 + i] & (PTE_P | PTE_A) == (PTE_P | PTE_A) and i // group != last:
            last = i // group
            found += 1
    return found


cdef bint _storms(const sc_mmu *mmu, sc_history *e, u32 spte, bint used) noexcept nogil:
    """An INVLPG exit for an entry of an unsync table. used: there was an access through it, for which a table that had
    been zapped would have been made anew. True: to zap it is cheaper by now, its other leaves included."""
    cdef const sc_histories *h = mmu.histories
    cdef int most = _threshold(h, e)
    e.invlpgs += 1
    e.invlpgs_now = min(e.invlpgs_now + 1, MANY)
    e.uses_now = min(e.uses_now + used, MANY)
    e.storm = _added(e.storm, h.invlpg - used * (h.write + h.fill + h.page), -_back(h))
    return (h.rules & RULE_ZAP and e.storm > most
            and e.storm > most + _accessed(mmu, spte >> 9) * h.fill + h.page)


cdef void _invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    cdef sc_histories *h = mmu.histories
    cdef sc_path path
    cdef sc_history *e = NULL
    cdef u32 page
    cdef bint zap = False
    cdef bint used
    if mmu.stats.mmu_unsync == 0 and h.rules & RULE_INVLPG:
        return                      # no exit, and nothing that lags
    count_exit(mmu, v.number, EXIT_INVLPG, va)
    if v.guest.mode != MODE_OFF and linear_exists(v, va):
        path_find(mmu, v, va, &path)
        if path.n:
            page = path.page[path.n - 1]
            if mmu.pages[page].unsync:
                e = history_get(h, mmu.pages[page].gfn)
                page = page * 512 + level_index(va, 1)
                # A fault of the guest makes the leaf anew, in which A is clear.
                used = (v.cr2 ^ va) >> 12 == 0 or mmu.table[page] & (PTE_P | PTE_A) == (PTE_P | PTE_A)
                zap = e.kept == KEPT_UNSYNC and _storms(mmu, e, page, used)
    mmu.alone.invlpg(mmu, v, va)
    if zap:
        page = <u32>(<u64>h.invlpg * e.invlpgs_now // (e.uses_now + <u32>1))
        _change(e, KEPT_ZAPPED, WHY_INVLPG)
        e.worth = page
        e.zaps += 1
        zap_gfn(mmu, e.key - 1)
        enter(mmu, v)


cdef void _invpcid(sc_mmu *mmu, sc_vcpu *v, u32 kind, u16 pcid, u64 va) noexcept nogil:
    """It exits where INVLPG does (SDM volume 3, 26.1.3)."""
    if mmu.stats.mmu_unsync == 0 and mmu.histories.rules & RULE_INVLPG:
        mmu.stats.invlpg += kind == INVPCID_ADDRESS
        return
    count_exit(mmu, v.number, EXIT_INVLPG, va)
    mmu.alone.invpcid(mmu, v, kind, pcid, va)


cdef void adaptive_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design. sc_mmu.histories is to be set before it is used."""
    unsync_design(mmu)
    mmu.alone = mmu.design
    mmu.design.exits &= ~<u32>(1 << EXIT_INVLPG)        # counted by itself, where it happens
    mmu.design.page_fault = _page_fault
    mmu.design.fast_fault = _fast_fault
    mmu.design.new_cr3 = _new_cr3
    mmu.design.stored = _stored
    mmu.design.invlpg = _invlpg
    mmu.design.invpcid = _invpcid
    mmu.may_unsync = _decide
    mmu.decider = mmu
