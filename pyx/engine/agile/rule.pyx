"""Which guest tables are shadowed, and which the processor walks itself, below marks: the rule of Gandhi, Hill and
Swift, "Agile Paging" (ISCA 2016), with numbers as settings.

A table, with what is below it, is given to the processor at the second store to it in an interval. It is shadowed again
if no entry that maps its frame came to be dirty in an interval. The paper looks at the host's entry; here the guest may
store through a leaf of the shadow as well, and the reverse map lists them all. A simpler rule of the paper's has all
tables shadowed again after each interval.

A table that the processor walks itself has a page in the pool that stands for it, empty, found by (gfn, role) as others
are: links to it are the marks, and where it goes, by recycling too, the marks go.
"""
from shadowcore.engine.bits cimport PTE_D, PTE_P, pte_addr
from shadowcore.engine.flushes cimport FLUSH_LINK, FLUSH_ZAP, request_flush
from shadowcore.engine.memory cimport mem_frame, mem_guest_frame, sc_no_frame
from shadowcore.engine.pool cimport hash_bucket, pool_children, pool_find, pool_take, pool_zap, shadows
from shadowcore.engine.rmap cimport list_first, list_next
from shadowcore.engine.role cimport role_level, role_nested, role_of_nested, role_pte_size
from shadowcore.engine.spte cimport spte_drop, spte_link
from shadowcore.engine.state cimport BACK_NEVER, BACK_RESET, memo_drop, sc_mmu
from shadowcore.engine.types cimport SC_NONE, u8, u32, u64

cdef enum:
    # Pages that one walk can need at once, of the shadow and of the host's tables, and as many to spare: in a pool that
    # has not so many beside those of roots, everything stays shadowed.
    ROOM = 64


cdef bint table_is_nested(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """The processor walks the guest table at gfn itself."""
    cdef u32 number
    if not mmu.stats.nested_tables:
        return False
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if mmu.pages[number].gfn == gfn and role_nested(mmu.pages[number].role):
            return True
        number = mmu.pages[number].hash_next
    return False


cdef u32 table_mark(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil:
    """The page that stands for the table at gfn where a shadow page would have `role`; SC_NONE when none is free."""
    cdef u32 number = pool_find(mmu, gfn, role_of_nested(role))
    if number != SC_NONE:
        mmu.stats.mmu_cache_hit += 1
        return number
    number = pool_take(mmu, gfn, role_of_nested(role))
    if number != SC_NONE:
        mmu.stats.mmu_cache_miss += 1
        mmu.stats.nested_tables += 1
    return number


cdef void _zap_below(sc_mmu *mmu, u32 number) noexcept nogil:
    """Zap a shadow page, and those below it to which nothing else leads: the processor comes by none of them."""
    cdef u32 child[512]
    cdef u32 n = pool_children(mmu, number, child)
    cdef u32 i
    pool_zap(mmu, number)
    for i in range(n):
        if mmu.pages[child[i]].active and mmu.pages[child[i]].parents == 0 and mmu.pages[child[i]].root_count == 0:
            _zap_below(mmu, child[i])


cdef bint _can_be_nested(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Every shadow page of the table can go: none is a root in use, which no entry leads to that could be a mark."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    if mmu.pool_pages < mmu.refill + 4 * mmu.n_vcpus + ROOM or mmu.n_free == 0:
        return False
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and mmu.pages[number].root_count:
            return False
        number = mmu.pages[number].hash_next
    return True


cdef u32 _shadow_of(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """A shadow page of the table at gfn, or SC_NONE."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE and not shadows(mmu, number, gfn):
        number = mmu.pages[number].hash_next
    return number


cdef void _zap_idle(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Zap the shadow pages of the table at gfn to which nothing leads, with what is below them."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and mmu.pages[number].parents == 0 and mmu.pages[number].root_count == 0:
            _zap_below(mmu, number)
            number = mmu.hash[hash_bucket(mmu, gfn)]    # others of the bucket may have gone too
        else:
            number = mmu.pages[number].hash_next


cdef void _zap_tables_named(sc_mmu *mmu, u64 gfn, int pte_size) noexcept nogil:
    """Zap the shadows, as far as nothing leads to them, of the tables that entries of the table at gfn name: the stores
    that came before have cut their links."""
    cdef const u8 *table = mem_guest_frame(mmu.mem, gfn << 12)
    cdef u64 gpte, frame
    cdef u32 i
    for i in range(4096 // pte_size):
        gpte = (<const u64 *>table)[i] if pte_size == 8 else (<const u32 *>table)[i]
        frame = mem_frame(mmu.mem, (gpte & pte_addr()) >> 12)
        if gpte & PTE_P and frame != sc_no_frame() and mmu.frames[frame].shadowed:
            _zap_idle(mmu, (gpte & pte_addr()) >> 12)


cdef void _to_nested(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Give the table to the processor: all its shadow pages go, and what led to them becomes marks."""
    cdef u32 number = _shadow_of(mmu, gfn)
    cdef u32 role = mmu.pages[number].role
    cdef u32 mark, spte
    while number != SC_NONE:
        mark = table_mark(mmu, gfn, mmu.pages[number].role)
        while mark != SC_NONE and mmu.pages[number].parents:
            spte = list_first(mmu.pages[number].parents) - 1
            spte_drop(mmu, spte)
            spte_link(mmu, spte, mark)
        _zap_below(mmu, number)
        number = _shadow_of(mmu, gfn)
    if role_level(role) > 1:
        _zap_tables_named(mmu, gfn, role_pte_size(role))
    request_flush(mmu, FLUSH_LINK)
    mmu.stats.to_nested += 1


cdef void table_stored(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """A store to a guest table was emulated, or one of the processor's (A or D) refused, as the table has a shadow."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u32 count = 1
    if frame == sc_no_frame() or mmu.frames[frame].shadowed == 0:
        return
    if mmu.written[frame] >> 8 == mmu.nested_number:
        count = min((mmu.written[frame] & 255) + 1, 255)
    mmu.written[frame] = mmu.nested_number << 8 | count
    if count >= mmu.nested_writes and _can_be_nested(mmu, gfn):
        _to_nested(mmu, gfn)


cdef void table_to_shadow(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """The table is shadowed again, when a fault next comes by: the marks go."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef u32 following
    cdef bint found = False
    while number != SC_NONE:
        following = mmu.pages[number].hash_next
        if mmu.pages[number].gfn == gfn and role_nested(mmu.pages[number].role):
            pool_zap(mmu, number)
            found = True
        number = following
    if found:
        request_flush(mmu, FLUSH_ZAP)
        mmu.stats.to_shadow += 1


cdef bint _was_stored(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Something has stored to the table since the interval began: an entry that maps it is dirty, or the emulator did
    before the table was given to the processor."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u32 member
    if frame == sc_no_frame():
        return False
    if mmu.written[frame] >> 8 == mmu.nested_number:
        return True
    member = list_first(mmu.frames[frame].rmap)
    while member:
        if mmu.table[member - 1] & PTE_D:
            return True
        member = list_next(mmu, mmu.frames[frame].rmap, member)
    return False


cdef bint _clean(sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Clear D in the entries that map the table; True if one had it. Once TLBs are flushed, the next store sets it."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u32 member
    cdef bint found = False
    if frame == sc_no_frame():
        return False
    member = list_first(mmu.frames[frame].rmap)
    while member:
        found = found or mmu.table[member - 1] & PTE_D
        mmu.table[member - 1] &= ~<u64>PTE_D
        member = list_next(mmu, mmu.frames[frame].rmap, member)
    return found


cdef void _interval_ends(sc_mmu *mmu) noexcept nogil:
    cdef u32 number
    cdef bint cleaned = False
    if mmu.nested_back == BACK_NEVER or not mmu.stats.nested_tables:
        return
    for number in range(mmu.pool_pages):
        if (mmu.pages[number].active and role_nested(mmu.pages[number].role)
                and (mmu.nested_back == BACK_RESET or not _was_stored(mmu, mmu.pages[number].gfn))):
            table_to_shadow(mmu, mmu.pages[number].gfn)
    for number in range(mmu.pool_pages):
        if mmu.pages[number].active and role_nested(mmu.pages[number].role):
            cleaned |= _clean(mmu, mmu.pages[number].gfn)
    if cleaned:
        memo_drop(mmu)
        request_flush(mmu, FLUSH_LINK)


cdef void interval_goes_on(sc_mmu *mmu) noexcept nogil:
    """One more emulated store, or walk that went on below a mark."""
    mmu.nested_clock += 1
    if mmu.nested_clock - mmu.nested_since < mmu.nested_interval:
        return
    _interval_ends(mmu)
    mmu.nested_since = mmu.nested_clock
    mmu.nested_number = (mmu.nested_number + 1) & 0xFFFFFF
