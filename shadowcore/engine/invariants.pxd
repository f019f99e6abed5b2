"""The invariants of the MMU, a checker each."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

cdef enum:
    SC_MAX_FINDINGS = 64

cdef struct sc_finding:
    int invariant                   # 1 for I1, ...
    int what                        # index of the sentence in invariants.SENTENCES
    u32 page                        # pool page, or SC_NONE
    u32 index                       # entry in the page, or 0
    u64 gfn                         # guest frame concerned

cdef struct sc_audit:
    sc_finding found[SC_MAX_FINDINGS]
    u32 n                           # violations, of which the first SC_MAX_FINDINGS are kept
    u64 sptes                       # present sptes looked at

cdef void audit_all(sc_mmu *mmu, sc_audit *a) noexcept nogil
cdef int mmu_settle(sc_mmu *mmu, sc_audit *a) noexcept nogil
cdef tuple audit_violations(const sc_audit *a)
