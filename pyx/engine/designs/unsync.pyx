"""Design `unsync`: the shadow MMU of today's Linux.

Leaf tables of the guest leave sync at the first store to them and lag until the guest flushes; tables above are
write-protected, and stores to them emulated. Roots of earlier CR3s are kept. Leaves may be large where the guest's page
and the host's are. Settings' defaults are those of Linux 6.1, which is followed event by event; what it does against
the architecture is a quirk (config.Quirk).

What a vcpu has to do before its guest goes on is a request, carried out by _enter, as KVM's vcpu_enter_guest does.
"""
from shadowcore.engine.bits cimport (
    CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE,
    PTE_A, PTE_D, PTE_P, PTE_PS, cr0_pg, level_index, pte_addr,
)
from shadowcore.engine.counters cimport (
    EXIT_CR0, EXIT_CR3, EXIT_CR4, EXIT_EFER, EXIT_EMULATE, EXIT_FILL, EXIT_GUEST, EXIT_INVLPG, EXIT_MMIO, EXIT_WRITE,
)
from shadowcore.engine.emulate cimport walk_updated
from shadowcore.engine.features cimport FEAT_PKU
from shadowcore.engine.flushes cimport FLUSH_LEAF, FLUSH_LINK, request_flush
from shadowcore.engine.hooks cimport POINT_POST_SYNC, POINT_PRE_SYNC, audit_point, count_exit
from shadowcore.engine.invalidate cimport inject_fault
from shadowcore.engine.lagging cimport LAGGING, lagging_audit
from shadowcore.engine.marks cimport marks_set
from shadowcore.engine.memory cimport (
    SC_POOL_HFN, mem_frame, mem_guest_frame, mem_pool_hpa, mem_pool_page, sc_no_frame,
)
from shadowcore.engine.pool cimport hash_bucket, pool_take, shadows
from shadowcore.engine.quirks cimport (
    LAGGING_LEAVES, QUIRK_DEVICE_UNASKED, QUIRK_FAULT_KEEPS_LEAF, QUIRK_ROLE_WITHOUT_NXE, QUIRK_STORE_ROUNDED,
    QUIRK_TAGGED_CR3_LAGS, QUIRK_WP0_HIDES_USER,
)
from shadowcore.engine.record cimport (
    RECORD_ACCESSED, RECORD_DEVICE_HIT, RECORD_DIRTY, RECORD_EMULATED, RECORD_EXIT, RECORD_FOUND,
    RECORD_MADE, record, record_page,
)
from shadowcore.engine.role cimport (
    ROLE_ACCESS, ROLE_DIRECT, ROLE_GLEVELS, ROLE_LEVEL, ROLE_NXE, ROLE_PKEY, ROLE_PSE, ROLE_QUADRANT, ROLE_SMAP,
    ROLE_SMEP, ROLE_WP0, role_direct, role_field, role_invalid, role_level, role_pte_size,
)
from shadowcore.engine.roots cimport root_slots
from shadowcore.engine.spte cimport spte_link
from shadowcore.engine.state cimport (
    REQUEST_CURRENT, REQUEST_FLUSH, REQUEST_GUEST, REQUEST_OBSOLETE, REQUEST_ROOTS, REQUEST_SYNC,
    linear_exists, memo_drop, sc_loaded, sc_mmu, sc_prev, sc_vcpu, vcpu_request,
)
from shadowcore.engine.sync cimport (
    FOR_LOAD, FOR_STORE, LEAF_DEVICE, LEAF_PROTECTED, LEAF_SAME, device_is_stale, device_rights, is_tracked,
    leaf_level, leaf_refetch,
    leaf_set, log_cleared, log_stopped, page_sync, prefetch_around, slot_protect, sync_below,
)
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, ACC_X, MODE_32, MODE_64, MODE_OFF, MODE_PAE, PF_I, PF_P, PF_RSVD, PF_U, PF_W,
    RC_EMULATE, RC_EXHAUSTED, RC_MMIO, RC_PF, RC_RETRY, SC_NONE, u32, u64,
)
from shadowcore.engine.walker cimport (
    guest_walk, paging_refused, paging_reserved, rights_fault, sc_paging, sc_walk, walk_above, walk_index,
)
from shadowcore.engine.zap cimport (
    count_no_large, entry_zap, leaf_drop, root_let_go, zap_all, zap_commit, zap_gfn, zap_oldest, zap_prepare,
)


# Roles

cdef u32 _role(const sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, bint direct, u32 access) noexcept nogil:
    """Role of the page of `level` on the way to va."""
    cdef const sc_paging *g = &v.guest
    cdef bint as_it_was = mmu.quirks & QUIRK_ROLE_WITHOUT_NXE
    cdef u32 role = (<u32>level << ROLE_LEVEL) | (<u32>direct << ROLE_DIRECT) | access << ROLE_ACCESS
    if g.mode == MODE_32:
        role |= (MODE_32 << ROLE_GLEVELS) | (<u32>(va >> (12 + 9 * level)) & ((<u32>1 << level) - 1)) << ROLE_QUADRANT
    else:
        role |= <u32>(MODE_64 if as_it_was else g.mode) << ROLE_GLEVELS
    if g.mode == MODE_OFF or not g.wp:
        role |= 1 << ROLE_WP0
    if g.mode == MODE_OFF:
        return role
    if not g.wp:
        # Keys ask whose a page is, as SMAP does, so that a leaf made without them may not serve with them.
        role |= <u32>g.smep << ROLE_SMEP
        role |= <u32>(g.smap or (g.pke and not mmu.quirks & QUIRK_WP0_HIDES_USER)) << ROLE_SMAP
    if not direct and not as_it_was:
        role |= <u32>g.nxe << ROLE_NXE
        if g.mode == MODE_32 and level == 2 and g.large_levels:
            role |= 1 << ROLE_PSE
    return role


cdef u32 _root_role(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil:
    cdef int level = v.guest.mode if v.guest.mode >= MODE_64 else 2
    return _role(mmu, v, <u64>slot << 30, level, v.guest.mode == MODE_OFF, ACC_ALL)


# Pages

cdef u32 _page(sc_mmu *mmu, const sc_vcpu *v, u64 gfn, u32 role) noexcept nogil:
    """The page of (gfn, role), found or made; SC_NONE when none is free. One that is unsync is synced in passing, and
    stays unsync. A table that is to be shadowed above the leaves cannot be unsync as a leaf table."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef bint ignored = False
    cdef int synced
    while number != SC_NONE:
        if mmu.pages[number].gfn != gfn or role_invalid(mmu.pages[number].role):
            pass
        elif mmu.pages[number].role != role:
            if role_level(role) > 1 and mmu.pages[number].unsync:
                zap_prepare(mmu, number, &ignored)
        elif role_direct(role):
            break
        else:
            if mmu.pages[number].unsync:
                synced = page_sync(mmu, v, number)
                if synced < 0:
                    zap_prepare(mmu, number, &ignored)
                    number = SC_NONE
                    break
                if synced:
                    request_flush(mmu, FLUSH_LEAF)
            mmu.pages[number].flood = 0
            break
        number = mmu.pages[number].hash_next
    zap_commit(mmu, False)
    if number != SC_NONE:
        mmu.stats.mmu_cache_hit += 1
        record_page(mmu, RECORD_FOUND, number)
        return number
    number = pool_take(mmu, gfn, role)
    if number != SC_NONE:
        count_no_large(mmu, &mmu.pages[number], 1)
        record_page(mmu, RECORD_MADE, number)
    return number


cdef bint _make_room(sc_mmu *mmu, u32 need) noexcept nogil:
    """Recycle if pages run short; False if there are not even `need`."""
    if mmu.n_free < mmu.min_free:
        zap_oldest(mmu, mmu.refill - mmu.n_free)
    return mmu.n_free >= need


# Roots

cdef void _last_resort(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil:
    """Make all the room there can be: let go of every earlier root, and of all roots in use by v but that of `slot`."""
    cdef u32 i
    for i in range(mmu.n_vcpus):
        _let_go(mmu, mmu.vcpus[i], _everything(mmu), False)
    for i in range(4):
        if <int>i != slot and slot >= 0 and v.roots[i] != SC_NONE:
            root_let_go(mmu, v.roots[i])
            v.roots[i] = SC_NONE
            v.hw.pdpte[i] = 0
    memo_drop(mmu)
    zap_oldest(mmu, mmu.n_active)


cdef u32 _everything(const sc_mmu *mmu) noexcept nogil:
    return (<u32>1 << mmu.prev_roots) - 1


cdef void _let_go(sc_mmu *mmu, sc_vcpu *v, u32 earlier, bint current) noexcept nogil:
    """Roots are no longer held: earlier ones, a bit each, and the present ones."""
    cdef u32 i
    for i in range(mmu.prev_roots):
        if earlier >> i & 1 and v.prev[i].page != SC_NONE:
            root_let_go(mmu, v.prev[i].page)
            v.prev[i] = sc_prev(0, SC_NONE, 0)
    if current and v.loaded:
        for i in range(4):
            if v.roots[i] != SC_NONE:
                root_let_go(mmu, v.roots[i])
                v.roots[i] = SC_NONE
        v.loaded = False
        v.root_cr3 = 0
    if current:
        vcpu_request(v, REQUEST_ROOTS)
    memo_drop(mmu)
    zap_commit(mmu, False)


cdef void _forget_device(sc_vcpu *v) noexcept nogil:
    v.device_va = 0


cdef void _sync_roots(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Whatever the present roots reach is brought back in sync."""
    cdef int slot
    if v.guest.mode == MODE_OFF or not v.loaded:
        return
    mmu.synced = v.number
    audit_point(mmu, POINT_PRE_SYNC)
    _forget_device(v)
    for slot in range(4):
        if v.roots[slot] != SC_NONE:
            sync_below(mmu, v, v.roots[slot])
    audit_point(mmu, POINT_POST_SYNC)


cdef bint _root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil:
    """The guest's root table, in PAE format a directory; with paging off a GiB."""
    direct[0] = v.guest.mode == MODE_OFF
    if v.guest.mode == MODE_PAE:
        gfn[0] = (v.guest.pdpte[slot] & pte_addr()) >> 12
        return v.guest.pdpte[slot] & PTE_P
    gfn[0] = <u64>slot << 18 if direct[0] else v.guest.root >> 12
    return True


cdef bint _load_root(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil:
    """Put root number `slot` in place, if the registers ask for one; False if there is no page for it."""
    cdef bint direct
    cdef u64 gfn
    cdef u32 page
    if not _root_of(mmu, v, slot, &gfn, &direct):
        return True
    page = _page(mmu, v, gfn, _root_role(mmu, v, slot))
    if page == SC_NONE:
        return False
    mmu.pages[page].root_count += 1
    mmu.stats.root_loads += 1
    v.roots[slot] = page
    return True


cdef bint _load_roots(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Put the roots in place that the registers ask for; False if there are no pages. One of four for which there is
    none is left to the fault that needs it."""
    cdef int slot
    cdef int found = 0
    if not _make_room(mmu, 1):
        _last_resort(mmu, v, -1)
    for slot in range(root_slots(v)):
        found += _load_root(mmu, v, slot)
    if not found:
        return False
    v.loaded = True
    v.root_cr3 = 0 if v.guest.mode == MODE_OFF else v.cr3
    memo_drop(mmu)
    _sync_roots(mmu, v)
    return True


cdef bint _is_obsolete(const sc_mmu *mmu, u32 page) noexcept nogil:
    return page != SC_NONE and role_invalid(mmu.pages[page].role)


cdef void _enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """All that is requested, until nothing is; then the processor has its roots. A request that syncs stands until that
    is done, so that at no point of an audit a vcpu without roots to walk from has none."""
    cdef u32 earlier, i, slot
    cdef bint current
    while v.requests:
        if v.requests & REQUEST_OBSOLETE:
            v.requests &= ~<u32>REQUEST_OBSOLETE
            earlier = 0
            for i in range(mmu.prev_roots):
                earlier |= <u32>_is_obsolete(mmu, v.prev[i].page) << i
            # Of the four roots of PAE format KVM cannot tell which is meant.
            current = v.guest.mode < MODE_64 or _is_obsolete(mmu, v.roots[0])
            if earlier or (v.loaded and current):
                _let_go(mmu, v, earlier, current)
        if v.requests & REQUEST_SYNC:
            _sync_roots(mmu, v)
            v.requests &= ~<u32>REQUEST_SYNC
        if v.requests & REQUEST_FLUSH:
            v.requests &= ~<u32>(REQUEST_FLUSH | REQUEST_CURRENT)
            mmu.stats.tlb_flush += 1
        if v.requests & REQUEST_CURRENT:
            v.requests &= ~<u32>REQUEST_CURRENT
            mmu.stats.tlb_flush += 1
        if v.requests & REQUEST_GUEST:
            mmu.stats.tlb_flush += 1
            _sync_roots(mmu, v)
            v.requests &= ~<u32>REQUEST_GUEST
            earlier = 0
            for i in range(mmu.prev_roots):
                if v.prev[i].page != SC_NONE and (mmu.pages[v.prev[i].page].unsync
                                                  or mmu.pages[v.prev[i].page].unsync_children):
                    earlier |= <u32>1 << i
            _let_go(mmu, v, earlier, False)
        if not v.loaded:
            vcpu_request(v, REQUEST_ROOTS)
            if not _load_roots(mmu, v):
                break               # the fault that comes will say so
        v.requests &= ~<u32>REQUEST_ROOTS
    for slot in range(4):
        v.hw.pdpte[slot] = 0 if v.roots[slot] == SC_NONE else mem_pool_hpa(v.roots[slot]) | PTE_P
    v.hw.root = 0 if v.roots[0] == SC_NONE else mem_pool_hpa(v.roots[0])


# Register loads

cdef inline void _other_instruction(const sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Something else is emulated than the store that was run again natively; 6.12 remembers that one all the same."""
    if mmu.rewrites:
        v.retried = False


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
            _let_go(mmu, v, _everything(mmu), True)
            vcpu_request(v, REQUEST_ROOTS if mmu.rewrites else REQUEST_ROOTS | REQUEST_FLUSH)
        return
    mmu.stats.insn_emulation += 1
    cr0 = v.cr0 ^ before.cr0
    cr4 = v.cr4 ^ before.cr4
    efer = v.efer ^ before.efer
    if not efer & ~<u64>EFER_LMA:
        _other_instruction(mmu, v)      # a load of EFER is skipped, not emulated
    if before.pdptes:
        _let_go(mmu, v, 0, True)
    if cr0 & cr0_pg() and not v.cr0 & cr0_pg():
        vcpu_request(v, REQUEST_GUEST)
    if cr0 == CR0_WP and not v.cr0 & cr0_pg() and not mmu.rewrites:
        cr0 = 0                     # 6.12: with paging off, no role asks
    if (cr0 & (cr0_pg() | CR0_WP) or cr4 & (CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE)
            or efer & (EFER_LME | EFER_NXE) or (cr4 & CR4_PCIDE and v.cr4 & CR4_PCIDE)):
        _let_go(mmu, v, _everything(mmu), True)
    if cr4 & CR4_PGE or (cr4 & CR4_PCIDE and not v.cr4 & CR4_PCIDE):
        vcpu_request(v, REQUEST_GUEST)
    elif cr4 & CR4_PAE or cr4 & v.cr4 & CR4_SMEP:
        vcpu_request(v, REQUEST_CURRENT)
    vcpu_request(v, REQUEST_ROOTS)
    _enter(mmu, v)


cdef bint _usable(const sc_mmu *mmu, const sc_vcpu *v, u32 page, u64 cr3) noexcept nogil:
    return page != SC_NONE and cr3 == v.cr3 and mmu.pages[page].role == _root_role(mmu, v, 0)


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
        _let_go(mmu, v, 0, True)
    elif not _exchange_roots(mmu, v):
        _let_go(mmu, v, 0, True)
    else:
        memo_drop(mmu)
        vcpu_request(v, REQUEST_ROOTS)
        _forget_device(v)
        mmu.pages[v.roots[0]].flood = 0


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """CR3 was loaded: a flush, too, unless bit 63 said no."""
    cdef u32 i
    cdef u32 earlier = 0
    mmu.stats.insn_emulation += 1
    _other_instruction(mmu, v)
    if before == NULL:
        _let_go(mmu, v, _everything(mmu), True)
    else:
        if before.pdptes:
            _let_go(mmu, v, 0, True)
        if v.cr3 != before.cr3:
            _other_cr3(mmu, v)
    if before == NULL or not before.tagged:
        vcpu_request(v, REQUEST_SYNC | REQUEST_CURRENT)
        if v.cr4 & CR4_PCIDE:
            for i in range(mmu.prev_roots):
                if v.prev[i].page != SC_NONE and (v.prev[i].cr3 ^ v.cr3) & 0xFFF == 0:
                    earlier |= <u32>1 << i
            _let_go(mmu, v, earlier, False)
    elif v.cr3 != before.cr3 and not mmu.quirks & QUIRK_TAGGED_CR3_LAGS:
        vcpu_request(v, REQUEST_SYNC)
    _enter(mmu, v)


# INVLPG

cdef void _invlpg_root(sc_mmu *mmu, sc_vcpu *v, u32 page, u64 va) noexcept nogil:
    """Of one root: the leaf for va, if its page is unsync."""
    cdef u32 spte
    cdef int level
    cdef u64 value
    if v.device_va == va & ~<u64>4095:
        _forget_device(v)
    while page != SC_NONE:
        level = role_level(mmu.pages[page].role)
        spte = page * 512 + level_index(va, level)
        value = mmu.table[spte]
        if level == 1 or (value & PTE_P and value & PTE_PS):
            if mmu.pages[page].unsync:
                leaf_refetch(mmu, v, spte)
            return
        if not mmu.pages[page].unsync_children or not value & PTE_P:
            return
        page = mem_pool_page(value)


cdef u32 _root_at(const sc_vcpu *v, u64 va) noexcept nogil:
    return v.roots[0 if v.guest.mode >= MODE_64 else <int>(va >> 30) & 3]


cdef void _invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """The present roots and the earlier ones."""
    cdef u32 i
    mmu.stats.insn_emulation += 1
    _other_instruction(mmu, v)
    if v.guest.mode != MODE_OFF and linear_exists(v, va):
        _invlpg_root(mmu, v, _root_at(v, va), va)
        for i in range(mmu.prev_roots):
            if v.prev[i].page != SC_NONE:
                _invlpg_root(mmu, v, v.prev[i].page, va)
    _enter(mmu, v)


cdef bint _guest_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """A #PF is an INVLPG of the present root; with the quirk, one with P set and no reserved bit."""
    if mmu.quirks & QUIRK_FAULT_KEEPS_LEAF and code & (PF_P | PF_RSVD) != PF_P:
        return False
    if v.guest.mode != MODE_OFF and linear_exists(v, va):
        _invlpg_root(mmu, v, _root_at(v, va), va)
        return True
    return False


# Faults

cdef u32 _last_entry(sc_mmu *mmu, const sc_vcpu *v, u64 va, bint used) noexcept nogil:
    """The last entry of the shadow on the way to va, or SC_NONE. used: the pages on the way are in use, and their
    floods end."""
    cdef u32 page = _root_at(v, va)
    cdef u32 spte = SC_NONE
    cdef int level
    while page != SC_NONE:
        if used:
            mmu.pages[page].flood = 0
        level = role_level(mmu.pages[page].role)
        spte = page * 512 + level_index(va, level)
        if level == 1 or not mmu.table[spte] & PTE_P or mmu.table[spte] & PTE_PS:
            break
        page = mem_pool_page(mmu.table[spte])
    return spte


cdef int _inject(sc_mmu *mmu, sc_vcpu *v, u64 va, sc_walk *w) noexcept nogil:
    inject_fault(mmu, v, va, w.error_code)
    count_exit(mmu, v.number, EXIT_GUEST, va)
    _enter(mmu, v)
    return RC_PF


cdef void _walked(sc_mmu *mmu, const sc_vcpu *v, const sc_walk *w) noexcept nogil:
    """A walk of the guest's tables set A and D: recorded from the top down."""
    cdef int level
    cdef u64 gpa
    mmu.stats.guest_walk_references += w.references
    if not w.updated:
        return
    if mmu.ring != NULL:
        for level in range(w.top, w.level - 1, -1):
            if w.updated >> level & 1:
                gpa = (w.table[level] << 12) + walk_index(w, level) * w.pte_size
                if level > w.level or not w.found & PTE_A:
                    record(mmu, RECORD_ACCESSED, gpa, 0, 0)
                if level == w.level and w.dirtied:
                    record(mmu, RECORD_DIRTY, gpa, 0, 0)
    walk_updated(mmu, v, w)


cdef int _device(sc_mmu *mmu, sc_vcpu *v, u32 access, u32 spte, u64 va, sc_walk *w) noexcept nogil:
    """An exit at an entry that remembers a device: no walk, unless the rights that are remembered do not suffice."""
    cdef u64 value = mmu.table[spte]
    cdef bint known = v.device_va != 0 and v.device_va == va & ~<u64>4095
    if v.guest.mode == MODE_OFF:
        known = v.device_gfn != 0 and v.device_gfn == va >> 12
    mmu.stats.pf_mmio_spte_hit += 1
    if not known or v.device_generation != mmu.generation:
        v.device_generation = mmu.generation
        v.device_gfn = (value & pte_addr()) >> 12
        v.device_rights = device_rights(value)
        v.device_va = va & ~<u64>4095
        record(mmu, RECORD_DEVICE_HIT, v.device_gfn, v.device_rights, 0)
    return _emulate_device(mmu, v, access, va, w)


cdef bint _device_suffices(const sc_mmu *mmu, const sc_vcpu *v, u32 access) noexcept nogil:
    """What is remembered of a device's page allows the access, without a walk of the guest's tables."""
    if access & PF_I or not v.device_va or rights_fault(&v.guest, v.device_rights, 0, access):
        return False
    if mmu.quirks & QUIRK_DEVICE_UNASKED:
        return True
    return not (access & PF_W and not v.device_rights & ACC_W or v.guest.pke and v.device_rights & ACC_U)


cdef int _emulate_device(sc_mmu *mmu, sc_vcpu *v, u32 access, u64 va, sc_walk *w) noexcept nogil:
    """The emulator's own look at the operand of an access to a device."""
    mmu.stats.insn_emulation += 1
    record(mmu, RECORD_EMULATED, va, 0, 0)
    _other_instruction(mmu, v)
    if v.guest.mode == MODE_OFF:
        w.gpa = va
    elif not _device_suffices(mmu, v, access):
        if guest_walk(mmu.mem, &v.guest, va, access, w) != 0:
            mmu.stats.guest_walk_references += w.references
            return _inject(mmu, v, va, w)
        _walked(mmu, v, w)
        if mem_frame(mmu.mem, w.gpa >> 12) != sc_no_frame():
            count_exit(mmu, v.number, EXIT_EMULATE, va)
            _enter(mmu, v)
            return RC_EMULATE       # what was remembered lags: the emulator finds RAM there
    else:
        w.gpa = v.device_gfn << 12 | (va & 4095)
    count_exit(mmu, v.number, EXIT_MMIO, va)
    mmu.stats.pf_mmio += 1
    _enter(mmu, v)
    return RC_MMIO


cdef bint _maps_its_own_table(const sc_walk *w, u64 gfn) noexcept nogil:
    """The guest's page holds one of the tables that lead to it: a large leaf would take W from itself for good."""
    cdef u64 mask = ~(((<u64>1 << (9 * (w.level - 1))) - 1))
    cdef int level
    for level in range(w.level, w.top + 1):
        if (gfn ^ w.table[level]) & mask == 0:
            return True
    return False


cdef int _fetch(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w, u32 rights, u32 pkey, u32 *spte,
                bint *linked) noexcept nogil:
    """Link what leads to va, and set the leaf: LEAF_*, or RC_EXHAUSTED. w: the complete walk of the guest's tables;
    with paging off, none."""
    cdef u64 gfn = w.gpa >> 12
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef bint off = v.guest.mode == MODE_OFF
    cdef int last = 3 if off else w.level      # no page above that level of the guest is direct
    cdef u32 page = _root_at(v, va)
    cdef u32 child
    cdef int goal, level, made
    cdef u64 value
    linked[0] = False
    if page == SC_NONE:             # one of four that was let go, or never found room
        if not _load_root(mmu, v, <int>(va >> 30) & 3):
            return RC_EXHAUSTED
        page = _root_at(v, va)
    level = role_level(mmu.pages[page].role)
    while level > last:
        mmu.pages[page].flood = 0
        spte[0] = page * 512 + level_index(va, level)
        value = mmu.table[spte[0]]
        if not value & PTE_P or value & PTE_PS:
            child = _page(mmu, v, w.table[level - 1],
                          _role(mmu, v, va, level - 1, False, walk_above(w, level - 1)))
            if child == SC_NONE:
                return RC_EXHAUSTED
            # The guest need not flush where an entry was not present: what is linked has to be right.
            if mmu.pages[child].unsync_children:
                sync_below(mmu, v, child)
            _link(mmu, spte[0], child)
            linked[0] = True
        page = mem_pool_page(mmu.table[spte[0]])
        level -= 1
    goal = 2 if off else w.level
    if not off and goal > 1 and mmu.rewrites and _maps_its_own_table(w, gfn) and (
            rights & ACC_W or (not v.guest.wp and not access & PF_U)):
        goal = 1
    goal = leaf_level(mmu, gfn, frame, goal)
    while True:
        mmu.pages[page].flood = 0
        spte[0] = page * 512 + level_index(va, level)
        if level == goal:
            break
        value = mmu.table[spte[0]]
        if value & PTE_P and not value & PTE_PS and not off:
            child = mem_pool_page(value)
            if role_field(mmu.pages[child].role, ROLE_ACCESS, ACC_ALL) != rights:
                entry_zap(mmu, spte[0])
                request_flush(mmu, FLUSH_LINK)
        value = mmu.table[spte[0]]
        if not value & PTE_P or value & PTE_PS:
            child = _page(mmu, v, gfn & ~((<u64>1 << (9 * (level - 1))) - 1),
                          _role(mmu, v, va, level - 1, True, rights) | pkey << ROLE_PKEY)
            if child == SC_NONE:
                return RC_EXHAUSTED
            _link(mmu, spte[0], child)
            linked[0] = True
        page = mem_pool_page(mmu.table[spte[0]])
        level -= 1
    made = leaf_set(mmu, v, spte[0], gfn & ~((<u64>1 << (9 * (goal - 1))) - 1), rights, pkey,
                    FOR_STORE if access & PF_W else FOR_LOAD)
    if made != LEAF_SAME:
        prefetch_around(mmu, v, spte[0])
    return made


cdef void _link(sc_mmu *mmu, u32 spte, u32 child) noexcept nogil:
    if mmu.table[spte] & PTE_P:
        leaf_drop(mmu, spte)
        request_flush(mmu, FLUSH_LINK)
    spte_link(mmu, spte, child)
    if mmu.pages[child].unsync or mmu.pages[child].unsync_children:
        marks_set(mmu, spte)


cdef inline bint _key_forbids(const sc_vcpu *v, u32 access, u32 rights, u32 pkey) noexcept nogil:
    """The page's key keeps user mode from storing to it, and, but for CR0.WP, the supervisor too."""
    return (v.guest.pke and not v.guest.wp and not access & PF_U and rights & ACC_U
            and v.guest.pkru >> (2 * pkey) & 2)


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """A page-fault exit, in the order in which Linux 6.1 goes about it."""
    cdef u64 va = hw.va
    cdef u32 spte
    cdef u64 gfn, old
    cdef u32 rights
    cdef u32 pkey = 0
    cdef bint off = v.guest.mode == MODE_OFF
    cdef bint linked, stale
    cdef int made
    if not v.loaded:
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    spte = _last_entry(mmu, v, va, False)
    old = 0 if spte == SC_NONE else mmu.table[spte]
    record(mmu, RECORD_EXIT, va, hw.error_code | (PF_RSVD if old and not old & PTE_P else 0), 0)
    stale = old and not old & PTE_P and device_is_stale(mmu, old)
    if old and not old & PTE_P and not stale:
        return _device(mmu, v, access, spte, va, w)
    mmu.stats.pf_taken += 1
    if guest_walk(mmu.mem, &v.guest, va, access, w) != 0:
        mmu.stats.guest_walk_references += w.references
        return _inject(mmu, v, va, w)
    rights = ACC_ALL
    if not off:
        _walked(mmu, v, w)
        rights = w.access if w.entry[w.level] & PTE_D else w.access & ~<u32>ACC_W
        if v.features & FEAT_PKU and v.guest.mode >= MODE_64:
            pkey = w.pkey
    gfn = w.gpa >> 12
    if hw.error_code & PF_P and access & PF_W and not stale and is_tracked(mmu, gfn):
        _last_entry(mmu, v, va, True)
        return _emulate(mmu, v, va)
    if mem_frame(mmu.mem, gfn) == sc_no_frame():
        v.device_va = va & ~<u64>4095
        v.device_gfn = gfn
        v.device_rights = rights & (ACC_W | ACC_U)
        v.device_generation = mmu.generation
    elif access & PF_W and _key_forbids(v, access, rights, pkey):
        return _emulate(mmu, v, va)     # the processor, whose CR0.WP is on, would refuse the store for good
    elif access & PF_W and not rights & ACC_W and not v.guest.wp and not access & PF_U and not off:
        # A supervisor's store that no right allows: the leaf grants it, and is no longer the user's.
        if rights & ACC_U and (v.guest.smap or v.guest.pke) and not mmu.quirks & QUIRK_WP0_HIDES_USER:
            return _emulate(mmu, v, va)     # they ask whose the page is, and the leaf would not tell
        rights = (rights | ACC_W) & ~<u32>ACC_U
        if v.guest.smep:
            rights &= ~<u32>ACC_X
    made = RC_EXHAUSTED
    if _make_room(mmu, 1):
        made = _fetch(mmu, v, va, access, w, rights, pkey, &spte, &linked)
    if made == RC_EXHAUSTED:
        _last_resort(mmu, v, 0 if v.guest.mode >= MODE_64 else <int>(va >> 30) & 3)
        made = _fetch(mmu, v, va, access, w, rights, pkey, &spte, &linked)
    if made == RC_EXHAUSTED:
        mmu.exhausted = v.number
        mmu.stats.pf_taken -= 1     # it comes to nothing, and is no exit
        return RC_EXHAUSTED
    if made == LEAF_DEVICE:
        mmu.stats.pf_emulate += 1
        return _emulate_device(mmu, v, access, va, w)
    if made == LEAF_PROTECTED:
        return _emulate(mmu, v, va)
    if made == LEAF_SAME:
        mmu.stats.pf_spurious += 1
    else:
        mmu.stats.pf_fixed += 1
    count_exit(mmu, v.number, EXIT_FILL if linked or not old & PTE_P else EXIT_WRITE, va)
    _enter(mmu, v)
    return RC_RETRY


cdef int _emulate(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    mmu.stats.pf_emulate += 1
    mmu.stats.insn_emulation += 1
    record(mmu, RECORD_EMULATED, va, 0, 0)
    if v.retried_va != va or v.retried_rip != v.rip:
        v.retried = False
    count_exit(mmu, v.number, EXIT_EMULATE, va)
    return RC_EMULATE


# Emulated stores

cdef bint _run_again(sc_mmu *mmu, sc_vcpu *v, u64 va, u64 gpa) noexcept nogil:
    """The second time at one place it is emulated after all: the instruction may need the table that it stores to."""
    cdef u64 freed = mmu.stats.page_frees
    if v.retried and v.retried_va == va and v.retried_rip == v.rip:
        _other_instruction(mmu, v)
        return False
    v.retried = False
    zap_gfn(mmu, gpa >> 12)
    if mmu.stats.page_frees == freed and not mmu.rewrites:
        return False                # only roots in use shadow the table: it is write-protected still
    v.retried = True
    v.retried_va = va
    v.retried_rip = v.rip
    _enter(mmu, v)
    return True


cdef inline bint _misaligned(u32 offset, u32 nbytes, u32 size) noexcept nogil:
    """The store does not lie within one entry, or is shorter than one of 4 bytes. One byte at the start of an entry is
    how Linux clears a bit."""
    if nbytes == 1 and not offset & (size - 1):
        return False
    return (offset ^ (offset + nbytes - 1)) & ~(size - 1) or nbytes < 4


cdef bint _drop_written(sc_mmu *mmu, u32 number, u32 offset, bint counts) noexcept nogil:
    """Zap what the page holds for the guest's entry at byte `offset` of its table; True if something was present."""
    cdef int level = role_level(mmu.pages[number].role)
    cdef u32 n = 1
    cdef u32 i
    cdef bint flush = False
    if role_pte_size(mmu.pages[number].role) == 4:
        offset *= 2                 # entries of the shadow have 8 bytes
        if level == 2:
            offset = (offset & ~<u32>7) * 2        # two of them stand for one of the guest's
            n = 2
        if offset >> 12 != role_field(mmu.pages[number].role, ROLE_QUADRANT, 3):
            return False
        offset &= 4095
    for i in range(number * 512 + offset // 8, number * 512 + offset // 8 + n):
        flush |= mmu.table[i] & PTE_P
        entry_zap(mmu, i)
        if counts and level > 1:
            mmu.stats.mmu_pde_zapped += 1
    return flush


cdef void _stored(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil:
    """The emulator, or a device, stored `nbytes` at gpa."""
    cdef u64 gfn = gpa >> 12
    cdef u32 offset = gpa & 4095
    cdef u64 entry = 0
    cdef u32 number
    cdef bint flush = False
    cdef bint ignored = False
    if v != NULL:
        _other_instruction(mmu, v)
    elif mmu.frames[mem_frame(mmu.mem, gfn)].shadowed == 0:
        return
    if mmu.n_pte4 + mmu.n_pte8 == 0:
        return
    if v != NULL and v.cr4 & CR4_PAE and nbytes == 4 and (offset & 7 <= 4 or mmu.quirks & QUIRK_STORE_ROUNDED):
        offset &= ~<u32>7           # half of an entry: what counts is the whole
        nbytes = 8
    if nbytes == 8 and offset <= 4088:
        entry = (<const u64 *>(mem_guest_frame(mmu.mem, gpa) + offset))[0]
    elif nbytes == 4 and offset <= 4092:
        entry = (<const u32 *>(mem_guest_frame(mmu.mem, gpa) + offset))[0]
    mmu.stats.mmu_pte_write += 1
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if shadows(mmu, number, gfn):
            if _misaligned(offset, nbytes, role_pte_size(mmu.pages[number].role)) or _floods(mmu, number, v):
                zap_prepare(mmu, number, &ignored)
                mmu.stats.mmu_flooded += 1
            else:
                flush |= _drop_written(mmu, number, offset, entry != 0)
        number = mmu.pages[number].hash_next
    zap_commit(mmu, flush)


cdef inline bint _floods(sc_mmu *mmu, u32 number, const sc_vcpu *v) noexcept nogil:
    """So many stores to a table above the leaves since it was last used are a flood."""
    if role_level(mmu.pages[number].role) == 1 or v == NULL or mmu.flood_threshold == 0:
        return False
    if mmu.pages[number].flood < 255:
        mmu.pages[number].flood += 1
    return mmu.pages[number].flood >= mmu.flood_threshold


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
    mmu.quirks |= LAGGING_LEAVES
    mmu.deferred = True
    mmu.design.exits = 1 << EXIT_CR0 | 1 << EXIT_CR3 | 1 << EXIT_CR4 | 1 << EXIT_EFER | 1 << EXIT_INVLPG
    mmu.design.invariants = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | LAGGING
    mmu.design.new_cr3 = _new_cr3
    mmu.design.reset = _reset
    mmu.design.invlpg = _invlpg
    mmu.design.guest_fault = _guest_fault
    mmu.design.root_of = _root_of
    mmu.design.guest_level = _guest_level
    mmu.design.page_fault = _page_fault
    mmu.design.stored = _stored
    mmu.design.run_again = _run_again
    mmu.design.enter = _enter
    mmu.design.audit = lagging_audit
    mmu.design.processor = _processor
    mmu.design.root_role = _root_role
    mmu.design.unprotect = zap_gfn
    mmu.design.zap_all = zap_all
    mmu.design.protect_slot = slot_protect
    mmu.design.log_cleared = log_cleared
    mmu.design.log_stopped = log_stopped
