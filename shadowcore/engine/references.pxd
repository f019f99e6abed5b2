"""The memory references of a walk, one by one: where each entry lies, of whose tables it is, and which of them the
caches of the processor leave out."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk

# A walk of the processor has ended, completely or not: the counter of references loses those that caches left out, and
# who asked for the references is told those that were made. Before anything changes the tables.
cdef void walk_ended(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w, bint complete) noexcept nogil
# The same of a walk that went on below a mark (agile): hw in the shadow's tables, w in the guest's, w.references with
# the entries of the host's tables.
cdef void walk_went_on(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *hw, const sc_walk *w,
                       bint complete) noexcept nogil
