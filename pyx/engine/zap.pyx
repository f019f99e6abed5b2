"""Zapping of shadow pages as Linux 6.1 does it, and the dropping of single entries."""
from shadowcore.engine.bits cimport PTE_P, PTE_PS
from shadowcore.engine.flushes cimport FLUSH_ZAP, request_flush
from shadowcore.engine.hooks cimport EVENT_ZAP, event
from shadowcore.engine.marks cimport marks_clear, marks_first, marks_next, marks_walk, sc_unsync, sc_unsync_at
from shadowcore.engine.memory cimport mem_frame, mem_leaf_frame, mem_pool_page, sc_no_frame
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.pool cimport (
    active_remove, count_shadowing, hash_bucket, hash_remove, pool_children, pool_victim, shadows,
)
from shadowcore.engine.record cimport RECORD_ALL_ZAPPED, RECORD_SYNCED, RECORD_ZAPPED, record, record_page
from shadowcore.engine.rmap cimport list_first, list_remove
from shadowcore.engine.role cimport ROLE_INVALID, role_direct, role_invalid, role_level
from shadowcore.engine.spte cimport spte_wipe
from shadowcore.engine.state cimport REQUEST_OBSOLETE, SLOT_ADDED, memo_drop, sc_mmu, vcpu_request
from shadowcore.engine.types cimport SC_NONE, u32, u64
from shadowcore.engine.zap cimport GENERATIONS


cdef u32 *leaf_list(sc_mmu *mmu, u64 value, int level) noexcept nogil:
    """The reverse map's list for what a present leaf of `level` maps."""
    cdef u64 frame = mem_leaf_frame(mmu.mem, value)
    if level == 1:
        return &mmu.frames[frame].rmap
    return &mmu.large_rmap[level - 2][frame >> (9 * (level - 1))]


cdef void leaf_counted(sc_mmu *mmu, u64 value, int level, int change) noexcept nogil:
    """A leaf came (1) or went (-1)."""
    if level == 1:
        mmu.stats.pages_4k += change
        mmu.mapped[mem_leaf_frame(mmu.mem, value)] += change
    elif level == 2:
        mmu.stats.pages_2m += change
    else:
        mmu.stats.pages_1g += change


cdef void leaf_drop(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Make a leaf 0, or what remembers a device; nothing, if it is 0 already."""
    cdef u64 value = mmu.table[spte]
    cdef int level = role_level(mmu.pages[spte >> 9].role)
    if value == 0:
        return
    if value & PTE_P:
        list_remove(mmu, leaf_list(mmu, value, level), spte)
        leaf_counted(mmu, value, level, -1)
    spte_wipe(mmu, spte)


cdef void entry_zap(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Make any entry 0."""
    cdef u64 value = mmu.table[spte]
    if value & PTE_P and not value & PTE_PS and role_level(mmu.pages[spte >> 9].role) > 1:
        list_remove(mmu, &mmu.pages[mem_pool_page(value)].parents, spte)
        spte_wipe(mmu, spte)
    else:
        leaf_drop(mmu, spte)


cdef void page_left_sync(sc_mmu *mmu, u32 page) noexcept nogil:
    """An unsync page is that no more."""
    record_page(mmu, RECORD_SYNCED, page)
    mmu.pages[page].unsync = False
    mmu.stats.mmu_unsync -= 1


cdef void count_no_large(sc_mmu *mmu, const sc_page *page, int change) noexcept nogil:
    """A page that shadows a guest table comes (1) or goes (-1): no large leaf covers the table."""
    cdef u64 frame
    if role_direct(page.role) or mmu.host_level <= 1:
        return
    frame = mem_frame(mmu.mem, page.gfn)
    if frame != sc_no_frame():
        mmu.no_large[0][frame >> 9] += change
        mmu.no_large[1][frame >> 18] += change


cdef u32 zap_prepare(sc_mmu *mmu, u32 number, bint *others) noexcept nogil:
    """Take a page out of use, with the unsync pages below it. Returns the number of pages that will be free; others:
    set if it is not the page alone."""
    cdef sc_page *page = &mmu.pages[number]
    cdef sc_unsync found
    cdef sc_unsync_at at
    cdef u32 zapped = 0
    cdef u32 i
    cdef bint ignored = False
    record_page(mmu, RECORD_ZAPPED, number)
    event(mmu, EVENT_ZAP, number, SC_NONE, page.gfn)
    mmu.stats.mmu_shadow_zapped += 1
    memo_drop(mmu)
    if role_level(page.role) > 1:
        while marks_walk(mmu, number, &found):
            marks_first(mmu, &found, &at)
            while marks_next(mmu, &found, &at):
                zap_prepare(mmu, at.page, &ignored)
                marks_clear(mmu, &at)
                zapped += 1
    if page.present:
        for i in range(512):
            if mmu.table[number * 512 + i]:
                entry_zap(mmu, number * 512 + i)
    while page.parents:
        entry_zap(mmu, list_first(page.parents) - 1)
    if zapped:
        others[0] = True
    if not role_invalid(page.role):
        count_no_large(mmu, page, -1)
        count_shadowing(mmu, page, -1)
        active_remove(mmu, number)
        if mmu.policy.queues != NULL:
            mmu.policy.gone(mmu, number)
        page.active = False
    if page.unsync:
        page_left_sync(mmu, number)
    if page.root_count == 0:
        zapped += 1
        if role_invalid(page.role):
            mmu.n_dying -= 1
        else:
            mmu.n_active -= 1
        page.next = mmu.zapped
        mmu.zapped = number
    elif not role_invalid(page.role):
        mmu.n_active -= 1
        mmu.n_dying += 1
        mmu.flush_epoch += 1        # the load of the root that takes its place flushes, and KVM does not count it
        for i in range(mmu.n_vcpus):
            vcpu_request(mmu.vcpus[i], REQUEST_OBSOLETE)
    page.role |= <u32>1 << ROLE_INVALID
    return zapped


cdef void zap_commit(sc_mmu *mmu, bint flush) noexcept nogil:
    """What was prepared becomes free, with one flush; without any, flush says whether there is one all the same."""
    cdef u32 number, i
    if mmu.zapped == SC_NONE:
        if flush:
            request_flush(mmu, FLUSH_ZAP)
        return
    request_flush(mmu, FLUSH_ZAP)
    while mmu.zapped != SC_NONE:
        number = mmu.zapped
        mmu.zapped = mmu.pages[number].next
        hash_remove(mmu, number)
        for i in range(8):
            mmu.below[number * 8 + i] = 0
        mmu.pages[number].unsync_children = 0
        mmu.pages[number].flood = 0
        mmu.pages[number].next = mmu.free_head
        mmu.free_head = number
        mmu.n_free += 1
        mmu.stats.page_frees += 1


cdef void root_let_go(sc_mmu *mmu, u32 number) noexcept nogil:
    """A vcpu holds a root no more; zap_commit is to follow."""
    cdef bint ignored = False
    mmu.pages[number].root_count -= 1
    if mmu.pages[number].root_count == 0 and role_invalid(mmu.pages[number].role):
        zap_prepare(mmu, number, &ignored)


cdef bint zap_gfn(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Zap the shadow pages of the guest table at `gfn`; True if there were any."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef bint ignored = False
    cdef bint found = False
    while number != SC_NONE:
        if shadows(mmu, number, gfn):
            zap_prepare(mmu, number, &ignored)
            found = True
        number = mmu.pages[number].hash_next
    zap_commit(mmu, False)
    if found:
        mmu.stats.mmu_unprotect += 1
    return found


cdef void zap_all(sc_mmu *mmu) noexcept nogil:
    """Zap every page, roots in use included, which are replaced."""
    cdef bint ignored = False
    while mmu.old != SC_NONE:
        zap_prepare(mmu, mmu.old, &ignored)
    zap_commit(mmu, False)


cdef void generation_next(sc_mmu *mmu) noexcept nogil:
    """Memory slots, or their flags, change. Entries that remember a device can tell so many generations apart."""
    mmu.generation += 2
    if mmu.generation & GENERATIONS == 0 and mmu.design.zap_all != NULL:
        mmu.design.zap_all(mmu)


cdef void slot_changes(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil:
    """A memory slot that goes, or moves, takes all pages along, roots in use when their vcpus enter. Where n frames
    come to be from `gfn` on, pages of tables without memory go: roots that led nowhere."""
    cdef u32 i, number, previous
    cdef bint others
    if what != SLOT_ADDED:
        generation_next(mmu)
        record(mmu, RECORD_ALL_ZAPPED, mmu.n_active + mmu.n_dying, mmu.valid_gen, 0)
        mmu.valid_gen ^= 1
        for i in range(mmu.n_vcpus):
            vcpu_request(mmu.vcpus[i], REQUEST_OBSOLETE)
        zap_all(mmu)
        return
    number = mmu.old
    while number != SC_NONE:
        previous = mmu.pages[number].prev
        if not role_direct(mmu.pages[number].role) and mmu.pages[number].gfn - gfn < n:
            others = False
            zap_prepare(mmu, number, &others)
            if others:
                previous = mmu.old  # the page before may have gone too
        number = previous
    zap_commit(mmu, False)


cdef bint frames_withdraw(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil:
    """The leaves that map some of n frames of RAM, of every size, by the reverse map; True if there were any."""
    cdef u64 i
    cdef int level
    cdef bint found = False
    for i in range(frame, frame + n):
        while mmu.frames[i].rmap:
            leaf_drop(mmu, list_first(mmu.frames[i].rmap) - 1)
            found = True
    for level in range(2, 4):
        for i in range(frame >> 9 * (level - 1), ((frame + n - 1) >> 9 * (level - 1)) + 1):
            while mmu.large_rmap[level - 2][i]:
                leaf_drop(mmu, list_first(mmu.large_rmap[level - 2][i]) - 1)
                found = True
    return found


cdef u32 _zap_victim(sc_mmu *mmu, u32 victim, bint *others) noexcept nogil:
    """Zap a victim; with sc_policy.children, the pages below to which nothing else leads. Pages that will be free."""
    cdef u32 child[512]
    cdef u32 n = 0
    cdef u32 zapped, i
    if mmu.policy.children:
        n = pool_children(mmu, victim, child)
    if mmu.policy.queues != NULL:
        mmu.policy.queues.named = victim
    zapped = zap_prepare(mmu, victim, others)
    for i in range(n):
        if mmu.pages[child[i]].active and mmu.pages[child[i]].parents == 0 and mmu.pages[child[i]].root_count == 0:
            others[0] = True
            zapped += _zap_victim(mmu, child[i], others)
    return zapped


cdef u32 _zap_known(sc_mmu *mmu, u32 want) noexcept nogil:
    """zap_oldest by a policy with books."""
    cdef u32 left = 2 * mmu.n_active
    cdef u32 zapped = 0
    cdef u32 victim
    cdef bint others = False
    while zapped < want:
        victim = pool_victim(mmu, &left)
        if victim == SC_NONE:
            break
        zapped += _zap_victim(mmu, victim, &others)
        mmu.policy.queues.named = SC_NONE
    return zapped


cdef u32 _zap_oldest(sc_mmu *mmu, u32 want) noexcept nogil:
    """zap_oldest in the order of creation, which policy fifo has: a root in use keeps its place."""
    cdef u32 zapped = 0
    cdef u32 number = mmu.old
    cdef u32 previous
    cdef bint others
    while number != SC_NONE:
        previous = mmu.pages[number].prev
        if mmu.pages[number].root_count:
            number = previous
            continue
        others = False
        zapped += _zap_victim(mmu, number, &others)
        if zapped >= want:
            break
        number = mmu.old if others else previous    # the page before may have gone too
    return zapped


cdef void zap_oldest(sc_mmu *mmu, u32 want) noexcept nogil:
    """Zap the pages that the policy names, but for roots in use, until `want` have gone."""
    cdef u32 zapped = _zap_known(mmu, want) if mmu.policy.queues != NULL else _zap_oldest(mmu, want)
    zap_commit(mmu, False)
    mmu.stats.mmu_recycled += zapped
