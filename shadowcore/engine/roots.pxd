"""Roles, and the shadow pages that serve as roots of a vcpu."""
from shadowcore.engine.quirks cimport QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_ROLE_WITHOUT_MODE
from shadowcore.engine.role cimport (
    ROLE_ACCESS, ROLE_DIRECT, ROLE_GLEVELS, ROLE_LEVEL, ROLE_NXE, ROLE_PSE, ROLE_QUADRANT, ROLE_WP0,
)
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport MODE_32, MODE_64, MODE_OFF, u32, u64
from shadowcore.engine.walker cimport sc_paging

cdef inline int root_slots(const sc_vcpu *v) noexcept nogil:
    """Roots a vcpu has: one, or in PAE format (a shadow for 32-bit guests and paging off, too) one for each GiB."""
    return 1 if v.hw.mode >= MODE_64 else 4

cdef inline bint wp0_leaves(const sc_paging *g) noexcept nogil:
    """Supervisor stores to read-only pages can be granted by a leaf that is W and not U.

    Such a leaf hides from the processor that the page is a user page, so it is not made where SMEP, SMAP or
    protection keys would look: there each such store is emulated.
    """
    return g.mode != MODE_OFF and not (g.wp or g.smep or g.smap or g.pke)

cdef inline u32 make_role(const sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, bint direct,
                          u32 access) noexcept nogil:
    """Role of the page that serves `va` at `level`; `access`: what the levels above (direct: the leaf) allow."""
    cdef const sc_paging *g = &v.guest
    cdef u32 role = (<u32>g.mode << ROLE_GLEVELS) | (<u32>level << ROLE_LEVEL) | (<u32>direct << ROLE_DIRECT)
    if not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        role |= access << ROLE_ACCESS
    if g.mode == MODE_32 or g.mode == MODE_OFF:
        # A table of 1024 4-byte entries has two (level 1) or four (level 2) shadow pages.
        role |= (<u32>(va >> (12 + 9 * level)) & ((<u32>1 << level) - 1)) << ROLE_QUADRANT
    if mmu.quirks & QUIRK_ROLE_WITHOUT_MODE:
        return role
    if not direct:
        if g.nxe:
            role |= 1 << ROLE_NXE
        if g.mode == MODE_32 and level == 2 and g.large_levels:
            role |= 1 << ROLE_PSE
    if wp0_leaves(g):
        role |= 1 << ROLE_WP0
    return role

cdef bint root_fits(const sc_mmu *mmu, const sc_vcpu *v, int slot, u32 page) noexcept nogil
cdef u32 root_load(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil
cdef void root_release(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil
cdef void roots_load(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void roots_release(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void release_everything(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil
cdef void slot_changes(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil
cdef void slot_changed(sc_mmu *mmu) noexcept nogil
