"""The page walk compiled once per mode, and the reserved bits of each mode."""
from libc.string cimport memset

from shadowcore.bits cimport PTE_P, level_mask, pte_nx
from shadowcore.gmode cimport gmode_32, gmode_64, gmode_la57, gmode_pae
from shadowcore.memory cimport sc_mem
from shadowcore.types cimport ACC_ALL, MODE_32, MODE_64, MODE_LA57, MODE_OFF, MODE_PAE, RC_OK, u32, u64
from shadowcore.walker cimport sc_paging, sc_walk, walk_body


cdef inline int walk_identity(u64 va, sc_walk *w) noexcept nogil:
    """Paging off: the linear address is the gpa, as if one entry of each root slot mapped its GiB."""
    w.gpa = va
    w.access = ACC_ALL
    w.pkey = 0
    w.references = 0
    w.updated = 0
    w.dirtied = False
    w.level = w.top = 3
    return RC_OK


cdef int guest_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """Walk the guest's tables for `access` (PF_W, PF_U, PF_I), setting A and D."""
    if p.mode == MODE_64:
        return walk_body(m, p, va, access, w, gmode_64(False, False))
    if p.mode == MODE_PAE:
        return walk_body(m, p, va, access, w, gmode_pae(False, False))
    if p.mode == MODE_32:
        return walk_body(m, p, va, access, w, gmode_32(False, False))
    if p.mode == MODE_LA57:
        return walk_body(m, p, va, access, w, gmode_la57(False, False))
    return walk_identity(va, w)


cdef int probe_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """guest_walk without any side effect."""
    if p.mode == MODE_64:
        return walk_body(m, p, va, access, w, gmode_64(False, True))
    if p.mode == MODE_PAE:
        return walk_body(m, p, va, access, w, gmode_pae(False, True))
    if p.mode == MODE_32:
        return walk_body(m, p, va, access, w, gmode_32(False, True))
    if p.mode == MODE_LA57:
        return walk_body(m, p, va, access, w, gmode_la57(False, True))
    return walk_identity(va, w)


cdef int shadow_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """Walk the shadow tables as the processor does; p.root and p.pdpte hold hpas."""
    if p.mode == MODE_64:
        return walk_body(m, p, va, access, w, gmode_64(True, False))
    if p.mode == MODE_LA57:
        return walk_body(m, p, va, access, w, gmode_la57(True, False))
    return walk_body(m, p, va, access, w, gmode_pae(True, False))


cdef bint pdptes_valid(const u64 *pdpte, int maxphyaddr) noexcept nogil:
    """PAE root entries: bits 2:1, 8:5 and those from MAXPHYADDR up must be 0 in a present one (SDM 4.4.1)."""
    cdef int i
    cdef u64 reserved = ~((<u64>1 << maxphyaddr) - 1) | 0x1E6
    for i in range(4):
        if pdpte[i] & PTE_P and pdpte[i] & reserved:
            return False
    return True


cdef void paging_reserved(sc_paging *p, int maxphyaddr, bint gbpages, bint pse, bint pse36) noexcept nogil:
    """Fill p.reserved and p.large_levels for p.mode and p.nxe (SDM tables 4-4 to 4-20)."""
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
