"""The page walk compiled once per mode, and the reserved bits of each mode."""
from libc.string cimport memset

from shadowcore.engine.bits cimport PTE_A, PTE_D, PTE_P, PTE_PS, PTE_W, level_index, level_mask, pte_addr, pte_nx
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.gmode cimport (
    GLANCE, PROBE, TABLES_GUEST, TABLES_NESTED, TABLES_SHADOW, WALK, in_mode, sc_gmode,
)
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_touch, sc_mem
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, ACC_X, MODE_32, MODE_OFF, MODE_PAE, PF_ACCESSES, PF_ASKED, PF_I, PF_P, PF_PK, PF_RSVD,
    PF_SGX, PF_SS, PF_U, PF_W, RC_HOST, RC_OK, npf_final, u16, u32, u64,
)
from shadowcore.engine.walker cimport host_glance, host_need, sc_paging, sc_walk, walk_body


cdef struct sc_asked:
    sc_mem *m
    const sc_paging *p
    u64 va
    u32 access
    sc_walk *w                      # NULL: a glance
    u64 *gpa
    u32 *references


cdef inline int _identity(const sc_asked *a, sc_gmode g) noexcept nogil:
    """Paging off: the linear address is the gpa, as if one entry of each root slot mapped its GiB."""
    a.gpa[0] = a.va
    a.references[0] = 0
    if g.reports:
        a.w.va = a.va
        a.w.pte_size = 8
        a.w.access = ACC_ALL
        a.w.pkey = 0
        a.w.updated = 0
        a.w.dirtied = False
        a.w.level = a.w.top = 3
    return RC_OK


cdef inline u64 _walk_in(void *asked, sc_gmode g) noexcept nogil:
    cdef const sc_asked *a = <const sc_asked *>asked
    if g.top == 0:
        return _identity(a, g)
    return walk_body(a.m, a.p, a.va, a.access, a.w, a.gpa, a.references, g)


cdef inline int _walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w, u64 *gpa, u32 *references,
                      int tables, int what) noexcept nogil:
    """walk_body for the mode of `p`; tables and what are constants."""
    cdef sc_asked a
    a.m = m
    a.p = p
    a.va = va
    a.access = access
    a.w = w
    a.gpa = gpa
    a.references = references
    return <int>in_mode(p.mode, tables, what, _walk_in, &a)


cdef void _touch(sc_mem *m, const sc_paging *p, const sc_walk *w) noexcept nogil:
    """A walk read its tables from the top down, and then set A and D."""
    cdef int level
    for level in range(w.top, w.level - 1, -1):
        mem_touch(m, w.table[level], False)
    for level in range(w.top, w.level - 1, -1):
        if w.updated >> level & 1:
            mem_touch(m, w.table[level], True)


cdef int guest_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """Walk the guest's tables for `access` (PF_W, PF_U, PF_I), setting A and D."""
    cdef int rc = _walk(m, p, va, access, w, &w.gpa, &w.references, TABLES_GUEST, WALK)
    if m.host != NULL and p.mode != MODE_OFF:
        _touch(m, p, w)
    return rc


cdef int probe_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """guest_walk without any side effect."""
    return _walk(m, p, va, access, w, &w.gpa, &w.references, TABLES_GUEST, PROBE)


cdef int shadow_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """Walk the shadow tables as the processor does; p.root and p.pdpte hold hpas."""
    return _walk(m, p, va, access, w, &w.gpa, &w.references, TABLES_SHADOW, WALK)


cdef int guest_glance(const sc_mem *m, const sc_paging *p, u64 va, u32 access, u64 *gpa) noexcept nogil:
    """Entries that a walk of the guest's tables reads, and where it leads; -1 if the walk has more to do than that."""
    cdef u32 references
    cdef int rc = _walk(<sc_mem *>m, p, va, access, NULL, gpa, &references, TABLES_GUEST, GLANCE)
    return <int>references if rc == RC_OK else -1


cdef int shadow_glance(const sc_mem *m, const sc_paging *p, u64 va, u32 access, u64 *hpa) noexcept nogil:
    """guest_glance, of the shadow tables."""
    cdef u32 references
    cdef int rc = _walk(<sc_mem *>m, p, va, access, NULL, hpa, &references, TABLES_SHADOW, GLANCE)
    return <int>references if rc == RC_OK else -1


cdef int host_walk(sc_mem *m, const sc_paging *p, u64 gpa, u32 access, u64 which, sc_walk *w) noexcept nogil:
    """The processor's walk of the host's tables for `gpa`, setting A and D: RC_OK, with w.hpa, w.host_entry and
    w.host_level; or RC_HOST, with w.refused_gpa and w.refused_code. which: npf_final() or npf_table(). The entries read
    are added to w.references."""
    cdef u64 base = p.host_root
    cdef u64 entry = 0
    cdef u64 *at
    cdef int level = p.host_top
    if base != 0 and (gpa >> (12 + 9 * level)) == 0:
        while True:
            at = <u64 *>(<size_t>m.pool + (base - (<u64>SC_POOL_HFN << 12))) + level_index(gpa, level)
            entry = at[0]
            w.references += 1
            if not entry & PTE_P or level == 1 or (level <= 3 and entry & PTE_PS):
                break
            base = entry & pte_addr()
            level -= 1
    if not entry & PTE_P or (access & PF_W and not entry & PTE_W):
        w.refused_gpa = gpa
        w.refused_code = which | PF_U | access | (entry & PTE_P)     # PF_P is bit 0 as well
        return RC_HOST
    entry |= PTE_A | (PTE_D if access & PF_W else 0)
    if at[0] != entry:
        at[0] = entry
    w.host_entry = entry
    w.host_level = level
    w.hpa = (entry & pte_addr() & ~level_mask(level)) | (gpa & level_mask(level))
    return RC_OK


cdef int nested_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """The processor's walk in two dimensions: as guest_walk; or RC_HOST, as host_walk says. w.references are those of
    both dimensions, and w.hpa is where the access leads."""
    cdef int rc
    w.refused_code = 0
    rc = _walk(m, p, va, access, w, &w.gpa, &w.references, TABLES_NESTED, WALK)
    if w.refused_code:
        return RC_HOST
    if rc != RC_OK:
        return rc
    return host_walk(m, p, w.gpa, access & (PF_W | PF_I), npf_final(), w)


cdef int nested_glance(const sc_mem *m, const sc_paging *p, u64 va, u32 access, u64 *gpa) noexcept nogil:
    """guest_glance, in two dimensions."""
    cdef u32 references
    cdef u64 hpa
    cdef int read
    if _walk(<sc_mem *>m, p, va, access, NULL, gpa, &references, TABLES_NESTED, GLANCE) != RC_OK:
        return -1
    read = host_glance(m, p, gpa[0], host_need(access), &hpa)
    return -1 if read < 0 else <int>references + read


cdef inline bint _refused(const sc_paging *p, u32 acc, u32 access) noexcept nogil:
    """Rights `acc` forbid `access` (SDM 4.6.1), protection keys aside."""
    cdef bint user = access & PF_U != 0
    if user and not acc & ACC_U:
        return True
    if access & PF_I:
        return not acc & ACC_X or (p.smep and not user and acc & ACC_U)
    if access & PF_W and not acc & ACC_W and (user or p.wp):
        return True
    return p.smap and not user and acc & ACC_U and not p.ac


# A bit for each combination of rights; a place for each access that an error code can tell.
sc_check(8 * sizeof((<sc_paging *>NULL).refused_by[0]) == ACC_ALL + 1)
sc_check((PF_ASKED | PF_PK | PF_SS) < PF_ACCESSES)
# What an access asks for says nothing of the answer, and the whole fits into 16 bits (sc_row, RunResult.error_code).
sc_check((PF_ASKED & (PF_P | PF_RSVD | PF_PK | PF_SGX)) == 0)
sc_check(PF_SGX >> (8 * sizeof(u16)) == 0)


cdef void paging_refused(sc_paging *p) noexcept nogil:
    """Fill p.refused_by from p.wp, p.smep, p.smap and p.ac. An access that there is not is refused by all rights."""
    cdef u32 acc
    cdef u32 access = 0
    memset(p.refused_by, 0xFF, sizeof(p.refused_by))
    while True:                     # each subset of PF_ASKED
        p.refused_by[access] = 0
        for acc in range(ACC_ALL + 1):
            if _refused(p, acc, access):
                p.refused_by[access] |= 1 << acc
        access = (access - PF_ASKED) & PF_ASKED
        if access == 0:
            return


cdef bint pdptes_valid(const u64 *pdpte, int maxphyaddr) noexcept nogil:
    """PAE root entries: bits 2:1, 8:5 and those from MAXPHYADDR up must be 0 in a present one (SDM 4.4.1)."""
    cdef int i
    cdef u64 reserved = ~((<u64>1 << maxphyaddr) - 1) | 0x1E6
    for i in range(4):
        if pdpte[i] & PTE_P and pdpte[i] & reserved:
            return False
    return True


cdef void _reserved(sc_paging *p, int maxphyaddr, bint gbpages, bint pse, bint pse36) noexcept nogil:
    """SDM tables 4-4 to 4-20."""
    cdef int level, width
    cdef u64 high
    memset(p.reserved, 0, sizeof(p.reserved))
    p.large_levels = 0
    if p.mode == MODE_OFF:
        return
    if p.mode == MODE_32:
        if pse:
            p.large_levels = 1 << 2
            width = min(maxphyaddr, 40) - 32 if pse36 else 0
            # bits 21:13 of a 4 MiB entry, but for the PSE-36 address bits that start at 13
            p.reserved[1][2] = 0x3FE000 & ~(((<u64>1 << width) - 1) << 13)
        return
    high = (<u64>1 << 52) - (<u64>1 << maxphyaddr)
    if p.mode == MODE_PAE:
        high = (<u64>1 << 63) - (<u64>1 << maxphyaddr)
    if not p.nxe:
        high |= pte_nx()
    for level in range(1, 6):
        p.reserved[0][level] = high
        p.reserved[1][level] = high
    p.large_levels = 1 << 2
    p.reserved[1][2] |= level_mask(2) & ~<u64>0x1FFF
    if gbpages:
        p.large_levels |= 1 << 3
        p.reserved[1][3] |= level_mask(3) & ~<u64>0x1FFF
    else:
        p.reserved[1][3] |= 0x80
    p.reserved[1][4] |= 0x80
    p.reserved[1][5] |= 0x80
    if p.amd:
        # APM vol. 2, 5.3.3: bits 8:7 of a PML4E and PML5E must be zero. (Of a PDPE that leads on bit 8 is ignored, see
        # 5ecad245de2a in Linux.)
        for level in range(4, 6):
            p.reserved[0][level] |= 1 << 8
            p.reserved[1][level] |= 1 << 8


cdef void paging_reserved(sc_paging *p, int maxphyaddr, bint gbpages, bint pse, bint pse36) noexcept nogil:
    """Fill p.reserved, p.odd_bits and p.large_levels for p.mode and p.nxe."""
    cdef int level
    _reserved(p, maxphyaddr, gbpages, pse, pse36)
    p.present_bits = PTE_P | (PTE_A if p.accessed_early else 0)
    for level in range(1, 6):
        p.odd_bits[level] = p.present_bits | p.reserved[0][level] | (0 if level == 1 else PTE_PS)
