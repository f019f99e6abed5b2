"""Shadow pages: found by (gfn, role), taken from the pool, zapped, recycled."""
from shadowcore.engine.memory cimport mem_frame, sc_no_frame
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.role cimport role_direct, role_invalid, role_nested, role_pte_size
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64

cdef inline u32 hash_bucket(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Fibonacci hashing: neighbouring gfns and gfns a power of two apart both spread over the buckets."""
    return <u32>((gfn * <u64>0x9E3779B97F4A7C15ULL) >> mmu.hash_shift)

cdef inline void active_push(sc_mmu *mmu, u32 number) noexcept nogil:
    """The page enters the active list as its youngest."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u32 young = mmu.young
    page.prev = SC_NONE
    page.next = young
    if young != SC_NONE:
        mmu.pages[young].prev = number
    else:
        mmu.old = number
    mmu.young = number

cdef inline void active_remove(sc_mmu *mmu, u32 number) noexcept nogil:
    """The page leaves the active list."""
    cdef sc_page *page = &mmu.pages[number]
    if page.prev != SC_NONE:
        mmu.pages[page.prev].next = page.next
    else:
        mmu.young = page.next
    if page.next != SC_NONE:
        mmu.pages[page.next].prev = page.prev
    else:
        mmu.old = page.prev

cdef inline u32 pool_find(const sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil:
    """The active page of (gfn, role), or SC_NONE."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if mmu.pages[number].gfn == gfn and mmu.pages[number].role == role:
            return number
        number = mmu.pages[number].hash_next
    return SC_NONE

cdef inline bint shadows(const sc_mmu *mmu, u32 number, u64 gfn) noexcept nogil:
    """A page of the bucket of `gfn` is one of the guest table there, and not zapped."""
    cdef const sc_page *page = &mmu.pages[number]
    return page.gfn == gfn and not role_direct(page.role) and not role_invalid(page.role)

cdef inline u64 count_shadowing(sc_mmu *mmu, const sc_page *page, int change) noexcept nogil:
    """Keep the counts of pages that shadow a guest table, or stand for one: the frame of the former, if it has one."""
    cdef u64 frame
    if role_direct(page.role):
        if role_nested(page.role):
            mmu.stats.nested_tables += change
        return sc_no_frame()
    frame = mem_frame(mmu.mem, page.gfn)
    if frame != sc_no_frame():
        mmu.frames[frame].shadowed += change
    if role_pte_size(page.role) == 4:
        mmu.n_pte4 += change
    else:
        mmu.n_pte8 += change
    return frame

cdef void hash_remove(sc_mmu *mmu, u32 number) noexcept nogil
cdef u32 pool_take(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil
cdef u32 pool_get(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil
cdef void pool_zap(sc_mmu *mmu, u32 number) noexcept nogil
cdef u32 pool_victim(sc_mmu *mmu, u32 *left) noexcept nogil
cdef u32 pool_children(const sc_mmu *mmu, u32 page, u32 *child) noexcept nogil
cdef void pool_recycle(sc_mmu *mmu, u32 target) noexcept nogil
cdef void pool_recycles(sc_mmu *mmu) noexcept nogil
cdef void pool_init(sc_mmu *mmu) noexcept nogil
cdef void pool_design(sc_mmu *mmu) noexcept nogil


cdef inline bint pool_has(sc_mmu *mmu, u32 need) noexcept nogil:
    """`need` pages can be taken; an injected failure counts as an attempt to take them."""
    if mmu.n_free < need:
        return False
    if mmu.fail_for == 0 or mmu.fail_after >= need:
        return True
    mmu.fail_for -= 1
    return False
