"""The events at which a design has something to do: its hook is called, if it has one."""
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.state cimport sc_loaded, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u16, u32, u64

cdef inline void design_exit(sc_mmu *mmu, u32 vcpu, u32 reason, u64 detail) noexcept nogil:
    """The guest loads a register, or executes INVLPG: EXIT_*, if that leaves the guest."""
    if mmu.design.exits >> reason & 1:
        count_exit(mmu, vcpu, reason, detail)

cdef inline void design_begin(sc_mmu *mmu) noexcept nogil:
    if mmu.design.begin != NULL:
        mmu.design.begin(mmu)

# before: what the registers held, or NULL: nobody knows, or it is the vcpu's first state.
cdef inline void design_new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    if mmu.design.new_cr3 != NULL:
        mmu.design.new_cr3(mmu, v, before)

cdef inline void design_reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    if mmu.design.reset != NULL:
        mmu.design.reset(mmu, v, before)

cdef inline void design_enter(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    if v.requests:
        mmu.design.enter(mmu, v)

cdef inline void design_invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    if mmu.design.invlpg != NULL:
        mmu.design.invlpg(mmu, v, va)

cdef inline void design_invpcid(sc_mmu *mmu, sc_vcpu *v, u32 kind, u16 pcid, u64 va) noexcept nogil:
    if mmu.design.invpcid != NULL:
        mmu.design.invpcid(mmu, v, kind, pcid, va)

cdef inline bint design_guest_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    return mmu.design.guest_fault != NULL and mmu.design.guest_fault(mmu, v, va, code)

cdef inline bint design_make_room(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    return mmu.design.make_room == NULL or mmu.design.make_room(mmu, v, va)
