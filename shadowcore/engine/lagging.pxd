"""The invariants of a design whose leaf tables may be unsync, where they are not those of the others."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32

cdef enum:
    # I1 to I3 in the form that they have here, and those that other designs do not have.
    LAGGING = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 10 | 1 << 11 | 1 << 12
    LAGGING_SYNCED = 1 << 0         # what holds, beside these, where the roots of a vcpu have just been synced

cdef void lagging_audit(sc_mmu *mmu, void *found, u32 which) noexcept nogil
