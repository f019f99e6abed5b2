"""Zapping as it is done today: pages are prepared one by one, and committed together with one flush.

A page that is prepared stays in its bucket, with a role that no key has, until it is committed. A root in use leaves
the active list at once and is replaced by the vcpus that hold it; it is committed when the last one lets go of it.
"""
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

cdef enum:
    GENERATIONS = 0x7FF             # of the memory slots, that an entry which remembers a device can tell apart

cdef u32 zap_prepare(sc_mmu *mmu, u32 page, bint *others) noexcept nogil
cdef void zap_commit(sc_mmu *mmu, bint flush) noexcept nogil
cdef bint zap_gfn(sc_mmu *mmu, u64 gfn) noexcept nogil
cdef void zap_all(sc_mmu *mmu) noexcept nogil
cdef void zap_oldest(sc_mmu *mmu, u32 want) noexcept nogil
cdef void entry_zap(sc_mmu *mmu, u32 spte) noexcept nogil
cdef void leaf_drop(sc_mmu *mmu, u32 spte) noexcept nogil
cdef u32 *leaf_list(sc_mmu *mmu, u64 value, int level) noexcept nogil
cdef void leaf_counted(sc_mmu *mmu, u64 value, int level, int change) noexcept nogil
cdef void count_no_large(sc_mmu *mmu, const sc_page *page, int change) noexcept nogil
cdef void page_left_sync(sc_mmu *mmu, u32 page) noexcept nogil
cdef void root_let_go(sc_mmu *mmu, u32 page) noexcept nogil
cdef void generation_next(sc_mmu *mmu) noexcept nogil
cdef void slot_changes(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil
cdef bint frames_withdraw(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil
