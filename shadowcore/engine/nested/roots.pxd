"""The root of the host's tables, and what is requested of a vcpu before its guest goes on, under design nested."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef u32 root_role(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil
cdef bint root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil
cdef u32 child_get(sc_mmu *mmu, const sc_vcpu *v, u64 gfn, int level) noexcept nogil
cdef void let_go(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void slots_change(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil
cdef void zap_tables(sc_mmu *mmu) noexcept nogil
