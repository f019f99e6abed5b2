"""What a vcpu walks from under design unsync: roles of today, pages found or made, roots of the present and of earlier
CR3s, and what is requested of a vcpu before its guest goes on.

A request is carried out by `enter`, as KVM's vcpu_enter_guest does.
"""
from shadowcore.engine.bits cimport (
    CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LME, EFER_NXE, cr0_pg,
)
from shadowcore.engine.state cimport REQUEST_CURRENT, REQUEST_FLUSH, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef inline bint role_changes(const sc_vcpu *v, u64 cr0, u64 cr4, u64 efer) noexcept nogil:
    """KVM takes roles to change where these bits of registers have: roots are let go."""
    return (cr0 & (cr0_pg() | CR0_WP) or cr4 & (CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE)
            or efer & (EFER_LME | EFER_NXE) or (cr4 & CR4_PCIDE and v.cr4 & CR4_PCIDE))

cdef inline void flush_requested(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """The flushes that are requested of v are done. That of all it has includes that of the present context."""
    if v.requests & REQUEST_FLUSH:
        v.requests &= ~<u32>(REQUEST_FLUSH | REQUEST_CURRENT)
        mmu.stats.tlb_flush += 1
    if v.requests & REQUEST_CURRENT:
        v.requests &= ~<u32>REQUEST_CURRENT
        mmu.stats.tlb_flush += 1

cdef u32 role_of(const sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, bint direct, u32 access) noexcept nogil
cdef u32 root_role(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil
cdef u32 page_get(sc_mmu *mmu, const sc_vcpu *v, u64 gfn, u32 role) noexcept nogil
cdef bint make_room(sc_mmu *mmu, u32 need) noexcept nogil
cdef void last_resort(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil
cdef u32 every_earlier(const sc_mmu *mmu) noexcept nogil
cdef void let_go(sc_mmu *mmu, sc_vcpu *v, u32 earlier, bint current) noexcept nogil
cdef void forget_device(sc_vcpu *v) noexcept nogil
cdef bint root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil
cdef bint load_root(sc_mmu *mmu, sc_vcpu *v, int slot) noexcept nogil
cdef u32 root_at(const sc_vcpu *v, u64 va) noexcept nogil
cdef void enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
