"""The host's tables as KVM's TDP MMU keeps them: each change of an entry is an event, and a table goes with the entry
that pointed to it, and with all that is below."""
from shadowcore.engine.bits cimport PTE_P, PTE_PS, PTE_W
from shadowcore.engine.flushes cimport FLUSH_LINK, request_flush
from shadowcore.engine.hooks cimport EVENT_ZAP, event
from shadowcore.engine.memory cimport mem_frame, mem_leaf_frame, mem_may_write, mem_pool_page
from shadowcore.engine.nested.tables cimport host_role, record_changed
from shadowcore.engine.pool cimport active_remove, hash_remove, pool_find, pool_take
from shadowcore.engine.record cimport (
    RECORD_DEVICE, RECORD_LEAF, RECORD_MADE, RECORD_SPLIT, RECORD_ZAPPED, record, record_flags, record_page,
    record_read_only, record_removed,
)
from shadowcore.engine.rmap cimport list_add, list_first
from shadowcore.engine.role cimport role_level
from shadowcore.engine.spte cimport spte_link, spte_put
from shadowcore.engine.state cimport memo_drop, sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport LEAF_DEVICE, LEAF_SAME, direct_page_gfn, leaf_fill, leaf_put
from shadowcore.engine.types cimport ACC_ALL, SC_NONE, u32, u64
from shadowcore.engine.zap cimport entry_zap, leaf_counted, leaf_drop, leaf_list


cdef u32 table_take(sc_mmu *mmu, u64 gfn, int level) noexcept nogil:
    """A table of `level` for what lies from `gfn` on, or SC_NONE. KVM counts none of these."""
    cdef u32 number = pool_take(mmu, gfn, host_role(level))
    if number != SC_NONE:
        record_page(mmu, RECORD_MADE, number)
    return number


cdef void table_link(sc_mmu *mmu, u32 spte, u32 child) noexcept nogil:
    """The empty entry `spte` leads to table `child`."""
    spte_link(mmu, spte, child)
    record_changed(mmu, direct_page_gfn(mmu, spte), 0, record_flags(mmu.table[spte]),
                   role_level(mmu.pages[spte >> 9].role))


cdef void table_free(sc_mmu *mmu, u32 number) noexcept nogil:
    """A table to which nothing leads, with no entries, goes back to the pool."""
    event(mmu, EVENT_ZAP, number, SC_NONE, mmu.pages[number].gfn)
    active_remove(mmu, number)
    hash_remove(mmu, number)
    mmu.pages[number].active = False
    mmu.pages[number].next = mmu.free_head
    mmu.free_head = number
    mmu.n_free += 1
    mmu.n_active -= 1
    mmu.stats.page_frees += 1


cdef void _table_zap(sc_mmu *mmu, u32 number) noexcept nogil:
    """Nothing leads to the table any more: it goes, and all below, in the order of the entries."""
    cdef int level = role_level(mmu.pages[number].role)
    cdef u32 spte, child
    cdef u64 value
    record_page(mmu, RECORD_ZAPPED, number)
    for spte in range(number * 512, number * 512 + 512):
        value = mmu.table[spte]
        record_changed(mmu, direct_page_gfn(mmu, spte), record_flags(value), record_removed(), level)
        if value == 0:
            continue
        child = SC_NONE
        if value & PTE_P and level > 1 and not value & PTE_PS:
            child = mem_pool_page(value)
        entry_zap(mmu, spte)
        if child != SC_NONE:
            _table_zap(mmu, child)
    table_free(mmu, number)


cdef void tree_zap(sc_mmu *mmu, u32 spte, u32 after) noexcept nogil:
    """Make an entry 0, with all below. after: what is recorded of what it becomes."""
    cdef u64 value = mmu.table[spte]
    cdef int level = role_level(mmu.pages[spte >> 9].role)
    entry_zap(mmu, spte)
    record_changed(mmu, direct_page_gfn(mmu, spte), record_flags(value), after, level)
    if value & PTE_P and level > 1 and not value & PTE_PS:
        _table_zap(mmu, mem_pool_page(value))


cdef void tree_clear(sc_mmu *mmu) noexcept nogil:
    """All below the root goes: first what entries of level 3 lead to, then what is left."""
    cdef u32 root = pool_find(mmu, 0, host_role(mmu.host_levels))
    cdef u32 pages[2]
    cdef u32 at[2]
    cdef u32 spte
    cdef int depth = 0
    cdef int to = <int>mmu.host_levels - 3      # entries of level 3 lie so many tables below the root
    if root == SC_NONE:
        return
    pages[0] = root
    at[0] = 0
    while depth >= 0:
        if at[depth] == 512:
            depth -= 1
            continue
        spte = pages[depth] * 512 + at[depth]
        at[depth] += 1
        if not mmu.table[spte] & PTE_P:
            continue
        if depth + 1 < to:
            depth += 1
            pages[depth] = mem_pool_page(mmu.table[spte])
            at[depth] = 0
            continue
        _clear_level_3(mmu, mem_pool_page(mmu.table[spte]))
    for spte in range(root * 512, root * 512 + 512):
        if mmu.table[spte] & PTE_P:
            tree_zap(mmu, spte, 0)


cdef void _clear_level_3(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef u32 spte
    for spte in range(page * 512, page * 512 + 512):
        if mmu.table[spte] & PTE_P:
            tree_zap(mmu, spte, 0)


cdef void _leaf_fill(sc_mmu *mmu, u32 spte, u64 value, int level) noexcept nogil:
    """A leaf for an entry that is 0."""
    if level == 1:
        leaf_fill(mmu, spte, mem_leaf_frame(mmu.mem, value), value)
        return
    spte_put(mmu, spte, value)
    list_add(mmu, leaf_list(mmu, value, level), spte)
    leaf_counted(mmu, value, level, 1)


cdef bint leaf_split(sc_mmu *mmu, u32 spte) noexcept nogil:
    """A large leaf becomes a table of leaves that grant the same; False if no page is free. No TLB has to be flushed:
    it may keep the large translation, for the frames and the rights are the same."""
    cdef u64 value = mmu.table[spte]
    cdef int level = role_level(mmu.pages[spte >> 9].role)
    cdef u64 gfn = direct_page_gfn(mmu, spte)
    cdef u32 child = table_take(mmu, gfn, level - 1)
    cdef u64 small = value & ~<u64>PTE_PS if level == 2 else value
    cdef u32 i
    if child == SC_NONE:
        return False
    leaf_drop(mmu, spte)
    for i in range(512):
        _leaf_fill(mmu, child * 512 + i, small + (<u64>i << (12 + 9 * (level - 2))), level - 1)
    spte_link(mmu, spte, child)
    record_changed(mmu, gfn, record_flags(value), record_flags(mmu.table[spte]), level)
    record(mmu, RECORD_SPLIT, gfn, value, level)
    return True


cdef int tree_set(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, int what) noexcept nogil:
    """Set the leaf at `spte` for `gfn`, in the place of whatever is there: LEAF_*."""
    cdef u64 before = mmu.table[spte]
    cdef int level = role_level(mmu.pages[spte >> 9].role)
    cdef u32 child = SC_NONE
    cdef u64 value
    cdef int made
    if before & PTE_P and level > 1 and not before & PTE_PS:
        child = mem_pool_page(before)
        entry_zap(mmu, spte)
    made = leaf_put(mmu, v, spte, gfn, ACC_ALL, what)
    value = mmu.table[spte]
    if value != before:
        record_changed(mmu, gfn, record_flags(before), record_flags(value), level)
    if child != SC_NONE:
        _table_zap(mmu, child)
        request_flush(mmu, FLUSH_LINK)
    if made == LEAF_DEVICE:
        record(mmu, RECORD_DEVICE, gfn, ACC_ALL, 0)
    else:
        if not mem_may_write(mmu.mem, gfn, mem_frame(mmu.mem, gfn)):
            value |= record_read_only()
        record(mmu, RECORD_LEAF, gfn, value, level)
    return LEAF_SAME if made == LEAF_SAME and child == SC_NONE else made


cdef void leaf_protect(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Take W from a leaf that has it, for a dirty log."""
    cdef u64 value = mmu.table[spte]
    if not value & PTE_W:
        return
    mmu.table[spte] = value & ~<u64>PTE_W
    memo_drop(mmu)
    record_changed(mmu, direct_page_gfn(mmu, spte), record_flags(value), record_flags(mmu.table[spte]),
                   role_level(mmu.pages[spte >> 9].role))


cdef bint _drop_listed(sc_mmu *mmu, u32 *head) noexcept nogil:
    cdef bint found = False
    while head[0]:
        tree_zap(mmu, list_first(head[0]) - 1, 0)
        found = True
    return found


cdef bint tree_withdraw(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil:
    """The leaves that map some of n frames of RAM go, in the order of the frames; True if there were any."""
    cdef u64 i
    cdef bint found = False
    for i in range(frame, frame + n):
        if i == frame or not i & 0x3FFFF:
            found |= _drop_listed(mmu, &mmu.large_rmap[1][i >> 18])
        if i == frame or not i & 511:
            found |= _drop_listed(mmu, &mmu.large_rmap[0][i >> 9])
        found |= _drop_listed(mmu, &mmu.frames[i].rmap)
    return found
