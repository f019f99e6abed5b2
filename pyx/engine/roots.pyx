"""Roles, and the shadow pages that serve as roots: which page a root has to be, the design says.

In 4- and 5-level mode there is one; otherwise the processor runs in PAE format and has four, one for each GiB (patch
5). Under `flush` all are direct pages. Under `cached` they are the shadow of the table that CR3 names, of the four PAE
directories, or of the four quarters of a 32-bit directory; direct pages with paging off. A page is pinned while it is
a root (patch 25).
"""
from shadowcore.engine.bits cimport PTE_P
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.flushes cimport FLUSH_SLOTS, request_flush
from shadowcore.engine.memory cimport mem_pool_hpa
from shadowcore.engine.pool cimport pool_get
from shadowcore.engine.role cimport (
    ROLE_ACCESS, ROLE_BITS, ROLE_DIRECT, ROLE_DIRTY, ROLE_GLEVELS, ROLE_GLOBAL, ROLE_INVALID, ROLE_LEVEL, ROLE_NXE,
    ROLE_PKEY, ROLE_PSE, ROLE_QUADRANT, ROLE_SMAP, ROLE_SMEP, ROLE_WP0,
)
from shadowcore.engine.roots cimport make_role, root_slots
from shadowcore.engine.state cimport memo_drop, page_is_dying, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport ACC_ALL, MODE_64, MODE_LA57, MODE_PAE, SC_NONE, u32, u64

# A role has room for all its fields, none of which reaches into the next: modes, levels, quadrants, rights, keys.
sc_check(ROLE_BITS <= 8 * sizeof(u32))
sc_check(MODE_LA57 >> (ROLE_LEVEL - ROLE_GLEVELS) == 0)
sc_check(5 >> (ROLE_QUADRANT - ROLE_LEVEL) == 0)
sc_check(3 >> (ROLE_DIRECT - ROLE_QUADRANT) == 0)
sc_check(1 >> (ROLE_ACCESS - ROLE_DIRECT) == 0)
sc_check(ACC_ALL >> (ROLE_NXE - ROLE_ACCESS) == 0)
sc_check(1 >> (ROLE_PSE - ROLE_NXE) == 0)
sc_check(1 >> (ROLE_WP0 - ROLE_PSE) == 0)
sc_check(1 >> (ROLE_GLOBAL - ROLE_WP0) == 0)
sc_check(1 >> (ROLE_PKEY - ROLE_GLOBAL) == 0)
sc_check(15 >> (ROLE_DIRTY - ROLE_PKEY) == 0)
sc_check(1 >> (ROLE_SMEP - ROLE_DIRTY) == 0)
sc_check(1 >> (ROLE_SMAP - ROLE_SMEP) == 0)
sc_check(1 >> (ROLE_INVALID - ROLE_SMAP) == 0)
sc_check(1 >> (ROLE_BITS - ROLE_INVALID) == 0)


cdef inline bint _root_key(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, u32 *role) noexcept nogil:
    """The key of the page that root number `slot` has to be, by the registers. False: that root stands for nothing."""
    cdef int level = v.guest.mode if v.guest.mode >= MODE_64 else 2
    cdef bint direct
    if not mmu.design.root_of(mmu, v, slot, gfn, &direct):
        return False
    if mmu.design.root_role != NULL:
        role[0] = mmu.design.root_role(mmu, v, slot)
    else:
        role[0] = make_role(mmu, v, <u64>slot << 30, level, direct, ACC_ALL)
    return True


cdef bint root_fits(const sc_mmu *mmu, const sc_vcpu *v, int slot, u32 page) noexcept nogil:
    """`page`, which exists, is what the registers ask for as root number `slot`, or was (unsync) until it went."""
    cdef u64 gfn
    cdef u32 role
    if not _root_key(mmu, v, slot, &gfn, &role) or mmu.pages[page].gfn != gfn:
        return False
    if page_is_dying(&mmu.pages[page]):
        role |= <u32>1 << ROLE_INVALID
    elif not mmu.pages[page].active:
        return False
    return mmu.pages[page].role == role


cdef u32 root_load(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil:
    """Put root number `slot` in place and pin it; SC_NONE if it stands for nothing, or the pool has no page for it."""
    cdef u64 gfn
    cdef u32 role, page
    if not _root_key(mmu, v, slot, &gfn, &role):
        return SC_NONE
    page = pool_get(mmu, gfn, role)
    if page == SC_NONE:
        return SC_NONE
    mmu.pages[page].root_count += 1
    mmu.stats.root_loads += 1
    v.roots[slot] = page
    v.hw.root = mem_pool_hpa(page)
    v.hw.pdpte[slot] = mem_pool_hpa(page) | PTE_P
    memo_drop(mmu)
    return page


cdef void root_release(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil:
    """Take root number `slot` out of place, if it is in; the page stays in the pool with its contents."""
    if v.roots[slot] == SC_NONE:
        return
    mmu.pages[v.roots[slot]].root_count -= 1
    v.roots[slot] = SC_NONE
    v.hw.pdpte[slot] = 0
    v.hw.root = 0
    memo_drop(mmu)


cdef void roots_load(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Put every root in place; one that finds no free page is left for the fault that needs it."""
    cdef int slot
    v.hw.mode = v.guest.mode if v.guest.mode >= MODE_64 else MODE_PAE
    for slot in range(root_slots(v)):
        root_load(mmu, v, slot)


cdef void roots_release(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    cdef int slot
    for slot in range(4):
        root_release(mmu, v, slot)


cdef void release_everything(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """The most drastic way of making room: v's root slots but the one that serves va, and all that is not pinned."""
    cdef int slot
    for slot in range(4):
        if root_slots(v) == 4 and slot != <int>(va >> 30) & 3:
            root_release(mmu, v, slot)
    mmu.design.zap_all(mmu)


cdef void slot_changes(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil:
    """Memory slots are about to change: no page stays, roots are put back in place when they have."""
    cdef u32 i
    for i in range(mmu.n_vcpus):
        roots_release(mmu, mmu.vcpus[i])
    mmu.design.zap_all(mmu)


cdef void slot_changed(sc_mmu *mmu) noexcept nogil:
    cdef u32 i
    request_flush(mmu, FLUSH_SLOTS)
    for i in range(mmu.n_vcpus):
        roots_load(mmu, mmu.vcpus[i])
