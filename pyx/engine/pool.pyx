"""The pool of shadow pages: hash, zapping and recycling. The active list is in the order of the policy.

Pages are clean (all entries 0) whenever they are free: zapping empties a page by the entries in use, so that no scan
is needed when it is taken again (patch 22 scanned all 512, twice).
"""
from libc.string cimport memset

from shadowcore.engine.absent cimport page_mark
from shadowcore.engine.bits cimport PTE_A, PTE_P, PTE_PS, PTE_W, pte_addr, sc_ctz64
from shadowcore.engine.flushes cimport (
    FLUSH_LOG, FLUSH_PROTECT, FLUSH_ZAP, FLUSH_ZAP_UPPER, entry_flush, request_flush, request_flush_of,
)
from shadowcore.engine.hooks cimport EVENT_ZAP, event
from shadowcore.engine.memory cimport mem_gfn, mem_leaf_frame, mem_pool_page, sc_no_frame
from shadowcore.engine.page cimport sc_frame, sc_page
from shadowcore.engine.pool cimport active_push, active_remove, count_shadowing, hash_bucket, pool_find
from shadowcore.engine.quirks cimport QUIRK_ROOT_EMPTIED
from shadowcore.engine.rmap cimport list_first, list_next, list_remove, rmap_remove, rmap_write_protect
from shadowcore.engine.role cimport role_direct, role_level
from shadowcore.engine.spte cimport leaf_is_listed, spte_drop, spte_is_writable, spte_wipe
from shadowcore.engine.state cimport USE_ACCESSED, memo_drop, sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64


cdef void pool_init(sc_mmu *mmu) noexcept nogil:
    """Every page free, in ascending order; every bucket empty. The arrays are zeroed by their allocation."""
    cdef u32 i
    for i in range(mmu.pool_pages):
        mmu.pages[i].next = i + 1 if i + 1 < mmu.pool_pages else SC_NONE
    for i in range(<u32>1 << (64 - mmu.hash_shift)):
        mmu.hash[i] = SC_NONE
    mmu.free_head = 0
    mmu.n_free = mmu.pool_pages
    mmu.n_active = 0
    mmu.young = SC_NONE
    mmu.old = SC_NONE
    mmu.zapped = SC_NONE


cdef inline bint _must_fail(sc_mmu *mmu) noexcept nogil:
    """For tests: this page, which nobody made sure of before, is not to be had."""
    if mmu.fail_for == 0:
        return False
    if mmu.fail_after:
        mmu.fail_after -= 1
        return False
    mmu.fail_for -= 1
    return True


cdef u32 _made(sc_mmu *mmu, u32 page) noexcept nogil:
    mmu.policy.queues.member[page].born = <u32>mmu.policy.queues.clock
    mmu.policy.made(mmu, page)
    return page


cdef u32 pool_take(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil:
    """A page from the free list for (gfn, role), of which there is none, to be counted by the caller; SC_NONE when none
    is free.

    A new page of a guest table write-protects that table's frame (patch 10).
    """
    cdef u32 number = mmu.free_head
    cdef u32 *bucket
    cdef u64 frame
    cdef sc_page *page
    if number == SC_NONE or _must_fail(mmu):
        return SC_NONE
    page = &mmu.pages[number]
    mmu.free_head = page.next
    mmu.n_free -= 1
    mmu.n_active += 1
    page.gfn = gfn
    page.role = role
    page.active = True
    page.nonglobal = page.unsync = False
    page.flood = 0
    page.slots = 0
    bucket = &mmu.hash[hash_bucket(mmu, gfn)]
    page.hash_next = bucket[0]
    bucket[0] = number
    active_push(mmu, number)
    if not role_direct(role):
        frame = count_shadowing(mmu, page, 1)
        if frame != sc_no_frame() and rmap_write_protect(mmu, frame) and mmu.lists_all:
            # A large leaf loses W for all that it maps.
            request_flush_of(mmu, FLUSH_PROTECT, 0 if mmu.host_level > 1 else gfn, mmu.host_level == 1)
        if mmu.absent:
            page_mark(mmu, number)
    if mmu.policy.queues != NULL:
        return _made(mmu, number)
    return number


cdef u32 pool_get(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil:
    """The page of (gfn, role), found or taken; SC_NONE when none is free."""
    cdef u32 number = pool_find(mmu, gfn, role)
    if number == SC_NONE:
        number = pool_take(mmu, gfn, role)
        mmu.stats.mmu_cache_miss += number != SC_NONE
        return number
    mmu.stats.mmu_cache_hit += 1
    return number


cdef void hash_remove(sc_mmu *mmu, u32 number) noexcept nogil:
    """The page leaves its bucket."""
    cdef u32 *link = &mmu.hash[hash_bucket(mmu, mmu.pages[number].gfn)]
    while link[0] != number:
        link = &mmu.pages[link[0]].hash_next
    link[0] = mmu.pages[number].hash_next


cdef inline void _unlink_parents(sc_mmu *mmu, u32 number) noexcept nogil:
    """Clear every entry that points to the page."""
    cdef u32 spte
    while mmu.pages[number].parents:
        spte = list_first(mmu.pages[number].parents) - 1
        list_remove(mmu, &mmu.pages[number].parents, spte)
        spte_wipe(mmu, spte)


cdef inline void _forget_leaf(sc_mmu *mmu, sc_frame *frames, u64 ram_hfn, u64 value, u32 spte) noexcept nogil:
    """rmap_remove, for what may not be writable. frames, ram_hfn: those of mmu, loaded once for many leaves."""
    cdef u32 *head
    if not leaf_is_listed(mmu, value):
        return
    head = &frames[((value & pte_addr()) >> 12) - ram_hfn].rmap
    if head[0] == spte + 1:
        head[0] = 0
    else:
        list_remove(mmu, head, spte)


cdef inline u32 _empty_leaf_table(sc_mmu *mmu, sc_page *page, u32 number) noexcept nogil:
    """Drop every entry of a page of level 1; the number of those that were present."""
    cdef u64 *table = mmu.table + <u64>number * 512
    cdef sc_frame *frames = mmu.frames
    cdef u64 ram_hfn = mmu.mem.ram_hfn
    cdef u64 bits
    cdef u32 removed = 0
    cdef u32 spte = number * 512
    cdef int word, i
    for word in range(8):
        bits = page.used[word]
        page.used[word] = 0
        if bits == ~<u64>0:
            for i in range(64):
                removed += table[i] & PTE_P
                _forget_leaf(mmu, frames, ram_hfn, table[i], spte + i)
            memset(table, 0, 64 * sizeof(u64))
        else:
            while bits:
                i = sc_ctz64(bits)
                bits &= bits - 1
                removed += table[i] & PTE_P
                _forget_leaf(mmu, frames, ram_hfn, table[i], spte + i)
                table[i] = 0
        table += 64
        spte += 64
    return removed


cdef inline u32 _empty_upper_table(sc_mmu *mmu, sc_page *page, u32 number) noexcept nogil:
    """Drop every entry of a page above level 1; the number of those that were present."""
    cdef u64 *table = mmu.table + <u64>number * 512
    cdef u64 bits, value
    cdef u32 removed = 0
    cdef int word, index
    for word in range(8):
        bits = page.used[word]
        page.used[word] = 0
        while bits:
            index = word * 64 + sc_ctz64(bits)
            bits &= bits - 1
            value = table[index]
            table[index] = 0
            if value & PTE_P:
                removed += 1
                list_remove(mmu, &mmu.pages[mem_pool_page(value)].parents, number * 512 + index)
    return removed


cdef inline void _empty(sc_mmu *mmu, u32 number) noexcept nogil:
    """Drop every entry of the page. Children stay in the pool, to be found again by (gfn, role) (patch 15)."""
    cdef sc_page *page = &mmu.pages[number]
    memo_drop(mmu)
    if role_level(page.role) == 1:
        mmu.stats.spte_removed += _empty_leaf_table(mmu, page, number)
        request_flush(mmu, FLUSH_ZAP)
    else:
        mmu.stats.spte_removed += _empty_upper_table(mmu, page, number)
        if page.present:
            entry_flush(mmu, FLUSH_ZAP_UPPER)
    page.present = 0


cdef void pool_zap(sc_mmu *mmu, u32 number) noexcept nogil:
    """Remove a page and every link to it. A root in use is emptied and kept as the youngest page (patch 25)."""
    cdef sc_page *page = &mmu.pages[number]
    event(mmu, EVENT_ZAP, number, SC_NONE, page.gfn)
    _unlink_parents(mmu, number)
    _empty(mmu, number)
    active_remove(mmu, number)
    mmu.stats.mmu_shadow_zapped += 1
    if page.root_count:
        active_push(mmu, number)
        return
    hash_remove(mmu, number)
    count_shadowing(mmu, page, -1)
    page.active = False
    page.next = mmu.free_head
    mmu.free_head = number
    mmu.n_free += 1
    mmu.n_active -= 1
    mmu.stats.page_frees += 1
    if mmu.policy.gone != NULL:
        mmu.policy.gone(mmu, number)


cdef void _zap_all(sc_mmu *mmu) noexcept nogil:
    """Zap every page once; only roots in use stay, empty."""
    cdef u32 number = mmu.old
    cdef u32 n = mmu.n_active
    cdef u32 previous
    while n:
        previous = mmu.pages[number].prev
        pool_zap(mmu, number)
        number = previous
        n -= 1


cdef bint _unprotect(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Zap the shadow pages of the guest table at `gfn`, each once; True if there were any (patches 14, 27)."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef u32 following
    cdef bint found = False
    while number != SC_NONE:
        following = mmu.pages[number].hash_next
        if mmu.pages[number].gfn == gfn and not role_direct(mmu.pages[number].role):
            pool_zap(mmu, number)
            found = True
        number = following
    if found:
        mmu.stats.mmu_unprotect += 1
    return found


cdef bint _accessed(sc_mmu *mmu, u32 page) noexcept nogil:
    """A is set in an entry that points to the page; it is cleared. TLBs are not flushed: what they hold sets no A."""
    cdef u32 spte = list_first(mmu.pages[page].parents)
    cdef bint found = False
    while spte:
        if mmu.table[spte - 1] & PTE_A:
            mmu.table[spte - 1] &= ~<u64>PTE_A
            found = True
        spte = list_next(mmu, mmu.pages[page].parents, spte)
    if found:
        memo_drop(mmu)              # the next walk sets A again
    return found


cdef u32 pool_victim(sc_mmu *mmu, u32 *left) noexcept nogil:
    """The next page to be recycled, no root in use, or SC_NONE. left: how many may still be looked at."""
    cdef u32 victim
    while left[0]:
        left[0] -= 1
        victim = mmu.policy.victim(mmu)
        if victim == SC_NONE:
            break
        if mmu.policy.uses & USE_ACCESSED and _accessed(mmu, victim):
            mmu.policy.used(mmu, victim)
            continue
        mmu.policy.queues.named = victim
        return victim
    return SC_NONE


cdef void _recycle_children(sc_mmu *mmu, u32 victim) noexcept nogil:
    """Zap a victim and the pages below it to which nothing else leads."""
    cdef u32 child[512]
    cdef u32 n = pool_children(mmu, victim, child)
    cdef u32 i
    mmu.stats.mmu_recycled += 1
    pool_zap(mmu, victim)
    for i in range(n):
        if mmu.pages[child[i]].active and mmu.pages[child[i]].parents == 0 and mmu.pages[child[i]].root_count == 0:
            if mmu.policy.queues != NULL:
                mmu.policy.queues.named = child[i]
            _recycle_children(mmu, child[i])


cdef u32 pool_children(const sc_mmu *mmu, u32 page, u32 *child) noexcept nogil:
    """The pages that entries of `page` point to, one by one; their number."""
    cdef u32 n = 0
    cdef u32 i
    if role_level(mmu.pages[page].role) > 1:
        for i in range(512):
            if mmu.table[page * 512 + i] & PTE_P and not (mmu.lists_all and mmu.table[page * 512 + i] & PTE_PS):
                child[n] = mem_pool_page(mmu.table[page * 512 + i])
                n += 1
    return n


cdef void _recycle_known(sc_mmu *mmu, u32 target) noexcept nogil:
    """pool_recycle by a policy with books."""
    cdef u32 left = 2 * mmu.n_active
    cdef u32 victim
    while mmu.n_free < target:
        victim = pool_victim(mmu, &left)
        if victim == SC_NONE:
            break
        if mmu.policy.children:
            _recycle_children(mmu, victim)
        else:
            mmu.stats.mmu_recycled += 1
            pool_zap(mmu, victim)
        mmu.policy.queues.named = SC_NONE


cdef void _recycle_with_children(sc_mmu *mmu, u32 target) noexcept nogil:
    """pool_recycle in the order of creation, where children go along. (There is no quirk with that setting.)"""
    cdef u32 budget = mmu.n_active
    cdef u32 victim
    while mmu.n_free < target and budget:
        budget -= 1
        victim = mmu.policy.victim(mmu)
        if mmu.pages[victim].root_count:
            mmu.policy.spared(mmu, victim)
        else:
            _recycle_children(mmu, victim)


cdef void pool_recycles(sc_mmu *mmu) noexcept nogil:
    """What the policy is, and whether children go along, is settled."""
    if mmu.policy.gone != NULL:
        mmu.policy.recycle = _recycle_known
    elif mmu.policy.children:
        mmu.policy.recycle = _recycle_with_children


cdef void pool_recycle(sc_mmu *mmu, u32 target) noexcept nogil:
    """Zap the pages that the policy names until `target` are free, or only roots in use are left (patch 17).

    A root in use is passed over (quirk: emptied first)."""
    cdef u32 budget = mmu.n_active
    cdef u32 victim
    if mmu.policy.recycle != NULL:
        mmu.policy.recycle(mmu, target)
        return
    while mmu.n_free < target and budget:
        budget -= 1
        victim = mmu.old            # without books, the order of the list is the policy's
        if mmu.pages[victim].root_count and not mmu.quirks & QUIRK_ROOT_EMPTIED:
            mmu.policy.spared(mmu, victim)
            continue
        if not mmu.pages[victim].root_count:
            mmu.stats.mmu_recycled += 1
        pool_zap(mmu, victim)


cdef void _protect_slot(sc_mmu *mmu, int slot) noexcept nogil:
    """Take W from every spte that maps a frame of memory slot `slot`, so that stores are seen again (dirty log)."""
    cdef u32 page, spte
    cdef u64 gfn
    for page in range(mmu.pool_pages):
        if not mmu.pages[page].active or not mmu.pages[page].slots >> slot & 1:
            continue
        for spte in range(page * 512, page * 512 + 512):
            if not spte_is_writable(mmu.table[spte]):
                continue
            gfn = mem_gfn(mmu.mem, ((mmu.table[spte] & pte_addr()) >> 12) - mmu.mem.ram_hfn)
            if gfn - mmu.mem.slots[slot].base_gfn < mmu.mem.slots[slot].npages:
                rmap_remove(mmu, spte)
                mmu.table[spte] &= ~<u64>PTE_W
                memo_drop(mmu)
    for _ in range(mmu.n_vcpus):
        request_flush_of(mmu, FLUSH_LOG, mmu.mem.slots[slot].base_gfn, mmu.mem.slots[slot].npages)


cdef bint _withdraw(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil:
    """Drop every leaf that maps some of n frames of RAM. The reverse map has the writable ones alone, so all pages of
    their slots are looked at."""
    cdef u32 page, spte
    cdef u64 slots = 0
    cdef int i
    cdef bint found = False
    for i in range(mmu.mem.nslots):
        if frame < mmu.mem.slots[i].frame + mmu.mem.slots[i].npages and mmu.mem.slots[i].frame < frame + n:
            slots |= <u64>1 << i
    for page in range(mmu.pool_pages):
        if not mmu.pages[page].active or not mmu.pages[page].slots & slots or role_level(mmu.pages[page].role) != 1:
            continue
        for spte in range(page * 512, page * 512 + 512):
            if mmu.table[spte] & PTE_P and mem_leaf_frame(mmu.mem, mmu.table[spte]) - frame < n:
                spte_drop(mmu, spte)
                found = True
    return found


cdef void _log_cleared(sc_mmu *mmu, int slot, u64 first, u64 n) noexcept nogil:
    _protect_slot(mmu, slot)


cdef void pool_design(sc_mmu *mmu) noexcept nogil:
    """Fill in what the designs of 2007 do with pages and their leaves."""
    mmu.design.unprotect = _unprotect
    mmu.design.zap_all = _zap_all
    mmu.design.protect_slot = _protect_slot
    mmu.design.log_cleared = _log_cleared
    mmu.design.withdraw = _withdraw
