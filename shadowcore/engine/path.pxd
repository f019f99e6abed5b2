"""The shadow pages that the processor comes through on its way to an address."""
from shadowcore.engine.bits cimport PTE_P, PTE_PS, level_index
from shadowcore.engine.memory cimport mem_pool_page
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport MODE_64, SC_NONE, u32, u64

cdef enum:
    MAX_LEVELS = 5

cdef struct sc_path:                # the pages from the root of an address down
    u32 page[MAX_LEVELS]
    int n

cdef inline void path_find(const sc_mmu *mmu, const sc_vcpu *v, u64 va, sc_path *path) noexcept nogil:
    """As far as entries are present, and lead to pages."""
    cdef u32 page = v.roots[0 if v.guest.mode >= MODE_64 else <int>(va >> 30) & 3]
    cdef u64 value
    cdef int level
    path.n = 0
    while page != SC_NONE and path.n < MAX_LEVELS:
        path.page[path.n] = page
        path.n += 1
        level = role_level(mmu.pages[page].role)
        value = mmu.table[page * 512 + level_index(va, level)]
        if level == 1 or not value & PTE_P or (mmu.lists_all and value & PTE_PS):
            break
        page = mem_pool_page(value)
