"""The guest kernel's edits of page tables, and the flushes that follow them."""
from shadowcore.engine.bits cimport PTE_P, pte_addr
from shadowcore.engine.types cimport RC_OK, u32, u64
from shadowcore.guest.state cimport PTE_NONE, RC_PANIC, sc_guest

cdef inline u64 entry_read(const sc_guest *g, u64 table, u32 index) noexcept nogil:
    """An entry as it stands, A and D of the processor included. `table` is the gpa of a frame of RAM."""
    cdef const void *at = g.ram + table + <u64>index * g.pte_size
    return (<const u32 *>at)[0] if g.pte_size == 4 else (<const u64 *>at)[0]

cdef inline u64 entry_frame(u64 entry) noexcept nogil:
    return (entry & pte_addr()) >> 12

cdef inline bint entry_has_frame(u64 entry) noexcept nogil:
    """Present, or kept out of reach by PROT_NONE."""
    return entry & (PTE_P | PTE_NONE) != 0

cdef inline int table_spent(u64 *left) noexcept nogil:
    """One more table of leaves is looked through, of `left` that there are: in broken tables there may be no end."""
    if left[0] == 0:
        return RC_PANIC
    left[0] -= 1
    return RC_OK

cdef struct sc_flush:               # what waits for a flush: see the fields of sc_guest
    u64 start
    u64 end
    bint wanted
    u32 first

cdef int entry_set(sc_guest *g, u64 table, u32 index, u64 value) noexcept nogil
cdef int entry_take(sc_guest *g, u64 table, u32 index, u64 *old) noexcept nogil
cdef int entry_protect(sc_guest *g, u64 table, u32 index) noexcept nogil
cdef int entry_age(sc_guest *g, u64 table, u32 index, bint *young) noexcept nogil
cdef int table_look(sc_guest *g, u64 table) noexcept nogil
cdef int table_find(sc_guest *g, u32 p, u64 va, int leaf, bint make, u64 *table) noexcept nogil
cdef int tables_trim(sc_guest *g, u32 p, u64 start, u64 end, u64 low, u64 high) noexcept nogil
cdef int root_make(sc_guest *g, u32 p) noexcept nogil
cdef void root_free(sc_guest *g, u32 p) noexcept nogil
cdef int root_trim(sc_guest *g, u32 p) noexcept nogil
cdef void flush_begin(sc_guest *g) noexcept nogil
cdef void flush_page(sc_guest *g, u64 va) noexcept nogil
cdef int flush_everywhere(sc_guest *g, u32 p, u64 start, u64 end) noexcept nogil
cdef int flush_free(sc_guest *g, u32 p, u64 frame, bint forgotten) noexcept nogil
cdef int flush_end(sc_guest *g, u32 p, bint forgotten) noexcept nogil
cdef void flush_aside(sc_guest *g, sc_flush *waiting) noexcept nogil
cdef void flush_resume(sc_guest *g, const sc_flush *waiting) noexcept nogil
