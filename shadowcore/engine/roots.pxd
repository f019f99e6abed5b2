"""Roles, and the shadow pages that serve as roots of a vcpu."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport MODE_64, u32, u64
from shadowcore.engine.walker cimport sc_paging

cdef inline int root_slots(const sc_vcpu *v) noexcept nogil:
    """Roots a vcpu has: one, or in PAE format (also for 32-bit guests and paging off) one for each GiB."""
    return 1 if v.guest.mode >= MODE_64 else 4

cdef bint wp0_leaves(const sc_paging *g) noexcept nogil
cdef u32 make_role(const sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, bint direct, u32 access) noexcept nogil
cdef bint root_fits(const sc_mmu *mmu, const sc_vcpu *v, int slot, u32 page) noexcept nogil
cdef u32 root_load(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil
cdef void root_release(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil
cdef void roots_load(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void roots_release(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void release_everything(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil
