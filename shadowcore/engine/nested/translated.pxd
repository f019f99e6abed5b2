"""What a TLB holds of nested paging, beside the host's tables as they are: for audits (I8)."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.tlb cimport sc_tlb_entry
from shadowcore.engine.types cimport u32

# The host's tables, from root `page`, still map the entry's page, writable if it lets stores pass.
cdef bint in_host_tables(const sc_mmu *mmu, u32 page, const sc_tlb_entry *e) noexcept nogil
# They still translate what an entry of a nested TLB does, to the same, and let stores pass if it does.
cdef bint maps_host(const sc_mmu *mmu, u32 page, const sc_tlb_entry *e) noexcept nogil
