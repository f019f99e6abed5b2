"""The host's tables of nested paging: direct pages in the pool, from one root that maps guest physical space.

KVM has two ways to keep them. With its direct MMU they are shadow pages as others are: found by gfn and role, recycled,
zapped together. With its TDP MMU (sc_mmu.tdp) a table lives as long as the entry that points to it. Here is the second.
"""
from shadowcore.engine.record cimport RECORD_CHANGED, record
from shadowcore.engine.role cimport ROLE_ACCESS, ROLE_DIRECT, ROLE_GLEVELS, ROLE_LEVEL
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport ACC_ALL, MODE_64, u32, u64

cdef inline u32 host_role(int level) noexcept nogil:
    """Role of a host's table: the same whatever the guest's registers are."""
    return MODE_64 << ROLE_GLEVELS | <u32>level << ROLE_LEVEL | 1 << ROLE_DIRECT | ACC_ALL << ROLE_ACCESS

cdef inline u32 host_tables_of_walk(const sc_mmu *mmu, const sc_vcpu *v) noexcept nogil:
    """Host tables that one walk of v can need: for each table of the guest's and the page, all below the root."""
    return 1 + <u32>(v.guest.mode + 1) * (mmu.host_levels - 1)

cdef inline u64 table_gfn(u64 gfn, int level) noexcept nogil:
    """The first gfn that the table of `level` for `gfn` stands for."""
    return gfn & ~((<u64>1 << 9 * level) - 1)

cdef inline void record_changed(sc_mmu *mmu, u64 gfn, u32 before, u32 after, int level) noexcept nogil:
    record(mmu, RECORD_CHANGED, gfn, before | <u64>after << 32, level)

cdef u32 table_take(sc_mmu *mmu, u64 gfn, int level) noexcept nogil
cdef void table_link(sc_mmu *mmu, u32 spte, u32 child) noexcept nogil
cdef bint leaf_split(sc_mmu *mmu, u32 spte) noexcept nogil
cdef int tree_set(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, int what) noexcept nogil
cdef void leaf_protect(sc_mmu *mmu, u32 spte) noexcept nogil
cdef void tree_zap(sc_mmu *mmu, u32 spte, u32 after) noexcept nogil
cdef void tree_clear(sc_mmu *mmu) noexcept nogil
cdef void table_free(sc_mmu *mmu, u32 page) noexcept nogil
cdef bint tree_withdraw(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil
