"""Control registers: checked loads and what they make of the MMU."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u64

cdef void vcpu_apply(sc_vcpu *v) noexcept nogil
cdef void vcpu_init(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef bint registers_possible(const sc_vcpu *v) noexcept nogil
cdef int load_cr0(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil
cdef int load_cr3(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil
cdef int load_cr4(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil
cdef int load_efer(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil
cdef void load_pkru(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil
cdef void ac_put(sc_vcpu *v, bint on) noexcept nogil
cdef void load_init(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void load_ac(sc_mmu *mmu, sc_vcpu *v, bint on) noexcept nogil

cdef inline void load_refused(sc_mmu *mmu) noexcept nogil:
    """A register load was #GP: where it leaves the guest, the emulator found that out."""
    mmu.stats.gp_guest += 1
    if mmu.lists_all:
        mmu.stats.insn_emulation += 1
