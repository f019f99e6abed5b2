"""What a vcpu walks from under design unsync: roles of today, pages found or made, roots of the present and of earlier
CR3s, and what is requested of a vcpu before its guest goes on.

A request is carried out by `enter`, as KVM's vcpu_enter_guest does.
"""
from shadowcore.engine.absent cimport page_mark
from shadowcore.engine.bits cimport PTE_P, pte_addr
from shadowcore.engine.flushes cimport FLUSH_LEAF, request_flush
from shadowcore.engine.hooks cimport POINT_POST_SYNC, POINT_PRE_SYNC, audit_point
from shadowcore.engine.memory cimport mem_frame, mem_pool_hpa, sc_no_frame
from shadowcore.engine.pool cimport hash_bucket, pool_take, shadows
from shadowcore.engine.quirks cimport QUIRK_ROLE_WITHOUT_NXE, QUIRK_WP0_HIDES_USER
from shadowcore.engine.record cimport RECORD_FOUND, RECORD_MADE, record_page
from shadowcore.engine.rmap cimport rmap_write_protect
from shadowcore.engine.role cimport (
    ROLE_ACCESS, ROLE_DIRECT, ROLE_GLEVELS, ROLE_LEVEL, ROLE_NXE, ROLE_PSE, ROLE_QUADRANT, ROLE_SMAP, ROLE_SMEP,
    ROLE_WP0, role_direct, role_field, role_invalid, role_level,
)
from shadowcore.engine.roots cimport root_slots
from shadowcore.engine.state cimport (
    REQUEST_GUEST, REQUEST_OBSOLETE, REQUEST_ROOTS, REQUEST_SYNC, memo_drop, sc_mmu, sc_prev, sc_vcpu, vcpu_request,
)
from shadowcore.engine.sync cimport page_sync, sync_below
from shadowcore.engine.types cimport ACC_ALL, MODE_32, MODE_64, MODE_OFF, MODE_PAE, SC_NONE, u32, u64
from shadowcore.engine.walker cimport sc_paging
from shadowcore.engine.zap cimport count_no_large, page_left_sync, root_let_go, zap_commit, zap_oldest, zap_prepare


cdef u32 role_of(const sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, bint direct, u32 access) noexcept nogil:
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


cdef u32 root_role(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil:
    cdef int level = v.guest.mode if v.guest.mode >= MODE_64 else 2
    return role_of(mmu, v, <u64>slot << 30, level, v.guest.mode == MODE_OFF, ACC_ALL)


cdef void _table_sync(sc_mmu *mmu, const sc_vcpu *v, u64 gfn, u32 role) noexcept nogil:
    """2.6.28: a page of the table at gfn is asked for, and whatever shadows it is in sync first; what was made for
    another paging mode, or other reserved bits, goes."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef bint ignored = False
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and mmu.pages[number].unsync:
            if (role_field(mmu.pages[number].role ^ role, ROLE_GLEVELS, 15) or frame == sc_no_frame()
                    or role_field(mmu.pages[number].role ^ role, ROLE_NXE, 1)):     # v's reserved bits are not its
                zap_prepare(mmu, number, &ignored)
            else:
                rmap_write_protect(mmu, frame)
                page_left_sync(mmu, number)
                mmu.stats.synced += 1
                page_sync(mmu, v, number)
                if mmu.absent:
                    page_mark(mmu, number)
                request_flush(mmu, FLUSH_LEAF)
        number = mmu.pages[number].hash_next
    zap_commit(mmu, False)


cdef u32 page_get(sc_mmu *mmu, const sc_vcpu *v, u64 gfn, u32 role) noexcept nogil:
    """The page of (gfn, role), found or made; SC_NONE when none is free. One that is unsync is synced in passing, and
    stays unsync. A table that is to be shadowed above the leaves cannot be unsync as a leaf table."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef bint ignored = False
    cdef int synced
    if mmu.one_role:
        _table_sync(mmu, v, gfn, role)
        number = mmu.hash[hash_bucket(mmu, gfn)]
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
        mmu.stats.mmu_cache_miss += 1
        count_no_large(mmu, &mmu.pages[number], 1)
        record_page(mmu, RECORD_MADE, number)
    return number


cdef bint make_room(sc_mmu *mmu, u32 need) noexcept nogil:
    """Recycle if pages run short; False if there are not even `need`."""
    if mmu.n_free < mmu.min_free:
        zap_oldest(mmu, mmu.refill - mmu.n_free)
    return mmu.n_free >= need


cdef void last_resort(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil:
    """Make all the room there can be: let go of every earlier root, and of all roots in use by v but that of `slot`."""
    cdef u32 i
    for i in range(mmu.n_vcpus):
        let_go(mmu, mmu.vcpus[i], every_earlier(mmu), False)
    for i in range(4):
        if <int>i != slot and slot >= 0 and v.roots[i] != SC_NONE:
            root_let_go(mmu, v.roots[i])
            v.roots[i] = SC_NONE
            v.hw.pdpte[i] = 0
    memo_drop(mmu)
    zap_oldest(mmu, mmu.n_active)


cdef u32 every_earlier(const sc_mmu *mmu) noexcept nogil:
    return (<u32>1 << mmu.prev_roots) - 1


cdef void let_go(sc_mmu *mmu, sc_vcpu *v, u32 earlier, bint current) noexcept nogil:
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


cdef void forget_device(sc_vcpu *v) noexcept nogil:
    v.device_va = 0


cdef void _sync_roots(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Whatever the present roots reach is brought back in sync."""
    cdef int slot
    if v.guest.mode == MODE_OFF or not v.loaded:
        return
    mmu.synced = v.number
    audit_point(mmu, POINT_PRE_SYNC)
    forget_device(v)
    for slot in range(4):
        if v.roots[slot] != SC_NONE:
            sync_below(mmu, v, v.roots[slot])
    audit_point(mmu, POINT_POST_SYNC)


cdef bint root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil:
    """The guest's root table, in PAE format a directory; with paging off a GiB."""
    direct[0] = v.guest.mode == MODE_OFF
    if v.guest.mode == MODE_PAE:
        gfn[0] = (v.guest.pdpte[slot] & pte_addr()) >> 12
        return v.guest.pdpte[slot] & PTE_P
    gfn[0] = <u64>slot << 18 if direct[0] else v.guest.root >> 12
    return True


cdef bint load_root(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil:
    """Put root number `slot` in place, if the registers ask for one; False if there is no page for it."""
    cdef bint direct
    cdef u64 gfn
    cdef u32 page
    if not root_of(mmu, v, slot, &gfn, &direct):
        return True
    page = page_get(mmu, v, gfn, root_role(mmu, v, slot))
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
    if not make_room(mmu, 1):
        last_resort(mmu, v, -1)
    for slot in range(root_slots(v)):
        found += load_root(mmu, v, slot)
    if not found:
        return False
    v.loaded = True
    v.root_cr3 = 0 if v.guest.mode == MODE_OFF else v.cr3
    memo_drop(mmu)
    _sync_roots(mmu, v)
    return True


cdef bint _is_obsolete(const sc_mmu *mmu, u32 page) noexcept nogil:
    return page != SC_NONE and role_invalid(mmu.pages[page].role)


cdef u32 root_at(const sc_vcpu *v, u64 va) noexcept nogil:
    return v.roots[0 if v.guest.mode >= MODE_64 else <int>(va >> 30) & 3]


cdef void enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
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
                let_go(mmu, v, earlier, current)
        if v.requests & REQUEST_SYNC:
            _sync_roots(mmu, v)
            v.requests &= ~<u32>REQUEST_SYNC
        flush_requested(mmu, v)
        if v.requests & REQUEST_GUEST:
            mmu.stats.tlb_flush += 1
            _sync_roots(mmu, v)
            v.requests &= ~<u32>REQUEST_GUEST
            earlier = 0
            for i in range(mmu.prev_roots):
                if v.prev[i].page != SC_NONE and (mmu.pages[v.prev[i].page].unsync
                                                  or mmu.pages[v.prev[i].page].unsync_children):
                    earlier |= <u32>1 << i
            let_go(mmu, v, earlier, False)
        if not v.loaded:
            vcpu_request(v, REQUEST_ROOTS)
            if not _load_roots(mmu, v):
                break               # the fault that comes will say so
        v.requests &= ~<u32>REQUEST_ROOTS
    for slot in range(4):
        v.hw.pdpte[slot] = 0 if v.roots[slot] == SC_NONE else mem_pool_hpa(v.roots[slot]) | PTE_P
    v.hw.root = 0 if v.roots[0] == SC_NONE else mem_pool_hpa(v.roots[0])
