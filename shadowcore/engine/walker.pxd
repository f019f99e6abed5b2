"""The page walk: one body for every mode, over guest tables (gpas), shadow tables (hpas), or guest tables whose every
address the host's tables translate (nested paging).

Rules: SDM vol. 3, chapter 4. Entries are examined from the top; the first that is not present, or has a reserved
bit set, ends the walk. Rights are judged after a complete walk, on the AND of all levels. A walk that faults changes
nothing (but with the quirk ACCESSED_EARLY); one that succeeds sets A in each entry used and, for a write, D in the
leaf. Probes and glances (gmode.pxd) change nothing at all.

Nested paging (APM vol. 2, 15.25): the entries of a guest's tables are read and written through the host's tables as a
user's stores, from the top down, then the final address as what the access is. What the host's tables refuse is an
exit. In PAE format the root entries are touched at each walk, and count as read; what counts of them is what CR3's
load found.
"""
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_P, PTE_PS, PTE_U, PTE_W, level_index, level_mask, pte_addr, pte_nx, pte_pkey, pte_rights,
)
from shadowcore.engine.gmode cimport sc_gmode
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_guest_frame, mem_is_rom, mem_mark_dirty, sc_mem
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, PF_ACCESSES, PF_I, PF_P, PF_PK, PF_RSVD, PF_U, PF_W, RC_OK, RC_PF, npf_table, u8, u32,
    u64,
)

# What a walk needs to know of the processor's registers.
cdef struct sc_paging:
    u64 root                        # address of the top table (unused by PAE)
    u64 pdpte[4]                    # PAE: root entries, cached when CR3 was loaded
    u64 reserved[2][6]              # bits that must be 0 in a present entry, by [PS bit][level]
    u64 present_bits                # what an entry that just leads on has of odd_bits: P, with accessed_early A as well
    u64 odd_bits[6]                 # by level: bits that tell an entry which just leads on (level 1: to a page)
    u32 large_levels                # bit L: an entry of level L with PS is a leaf
    u32 pkru                        # PKRU
    int mode                        # MODE_*
    bint wp                         # CR0.WP
    bint nxe                        # EFER.NXE
    bint smep                       # CR4.SMEP
    bint smap                       # CR4.SMAP
    bint pke                        # CR4.PKE, 4- and 5-level paging only
    bint ac                         # EFLAGS.AC
    bint fetch_coded                # fetches show in error codes: NXE with 8-byte entries, or SMEP
    bint amd                        # the rules of AMD: bit 8 of entries at levels 4 and 5 must be 0
    bint accessed_early             # quirk: A is set on the way down, before rights are judged
    u64 host_root                   # nested paging: hpa of the top table of the host's; 0: there is none
    int host_top                    # ... and its level, 4 or 5
    u8 refused_by[PF_ACCESSES]      # by access (PF_ASKED): bit ACC_* is set if those rights of a whole walk refuse it

cdef struct sc_walk:
    u64 va                          # linear address
    u64 gpa                         # where the access leads
    u64 entry[6]                    # entry found at each level
    u64 table[6]                    # gfn (shadow: hfn) of the table at each level
    u64 found                       # the leaf as it was, if the walk set A or D in it
    u32 access                      # ACC_* of the whole walk
    u32 pkey                        # protection key of the leaf
    u32 error_code                  # PF_* when the walk failed
    u32 references                  # entries read
    u32 updated                     # bit L: A or D was set in the entry at level L
    bint dirtied                    # D was set in the leaf
    int level                       # level of the last entry examined
    int top                         # level of the first
    int pte_size                    # bytes of an entry
    # Nested paging.
    u64 refused_gpa                 # where the host's tables refused the walk
    u64 refused_code                # ... and the error code of that exit: PF_* and npf_*(); 0: they did not
    u64 host_entry                  # of the last gpa that they translated: the leaf
    u64 hpa                         # ... where it leads
    int host_level                  # ... level of the leaf

cdef inline u32 table_index(u64 va, int level, int pte_size) noexcept nogil:
    """Number of the entry for `va` in a table of `level`."""
    if pte_size == 8:
        return level_index(va, level)
    return <u32>(va >> (12 + 10 * (level - 1))) & 1023

cdef inline u32 walk_index(const sc_walk *w, int level) noexcept nogil:
    """Number of the entry at `level` in its table."""
    return table_index(w.va, level, w.pte_size)

cdef inline u32 walk_above(const sc_walk *w, int level) noexcept nogil:
    """ACC_* that the levels above `level` allow."""
    cdef u32 acc = ACC_ALL
    cdef int upper = w.top
    while upper > level:
        acc &= pte_rights(w.entry[upper])
        upper -= 1
    return acc

cdef inline u32 key_fault(const sc_paging *p, u32 acc, u32 pkey, u32 access) noexcept nogil:
    """PF_PK | PF_P if the protection key of a page with rights `acc` forbids `access`, which is no fetch."""
    cdef u32 key = (p.pkru >> (2 * pkey)) & 3
    if acc & ACC_U and (key & 1 or (key & 2 and access & PF_W and (access & PF_U or p.wp))):
        return PF_P | PF_PK
    return 0

cdef inline u32 rights_fault(const sc_paging *p, u32 acc, u32 pkey, u32 access) noexcept nogil:
    """0 if `access` (PF_W, PF_U, PF_I) is allowed by rights `acc`, else PF_P, with PF_PK where a key forbids it."""
    cdef u32 fault = (p.refused_by[access] >> acc) & PF_P
    if p.pke and not access & PF_I:
        fault |= key_fault(p, acc, pkey, access)
    return fault

cdef inline u32 access_code(const sc_paging *p, u32 access) noexcept nogil:
    """The part of an error code that describes the access itself."""
    if access & PF_I and not p.fetch_coded:
        return access & ~<u32>PF_I
    return access

# What one level of a walk came to.
cdef enum:
    STEP_DOWN = 0                   # to the table below
    STEP_LEAF = 1
    STEP_FAULT = 2

cdef inline bint walk_table(const sc_mem *m, u64 base, u8 **table, sc_gmode g) noexcept nogil:
    """Find the table at `base`; False where there is no memory. Shadow tables lie in the pool."""
    if g.host:
        base -= <u64>SC_POOL_HFN << 12
        table[0] = <u8 *>m.pool + base
        return base < m.pool_pages << 12
    table[0] = mem_guest_frame(m, base)
    return table[0] != NULL

cdef inline void set_entry_bits(sc_mem *m, sc_walk *w, int level, u64 bits, sc_gmode g) noexcept nogil:
    cdef u8 *table
    w.entry[level] |= bits
    if not g.host and mem_is_rom(m, w.table[level]):
        return                      # the walk goes on as if they were set
    walk_table(m, w.table[level] << 12, &table, g)
    w.updated |= 1 << level
    table[table_index(w.va, level, g.pte_size) * g.pte_size] |= <u8>bits    # bits 5 and 6: the low byte of an entry
    if not g.host:
        mem_mark_dirty(m, w.table[level])

cdef inline u64 host_entry(const sc_mem *m, u64 base, u64 gpa, int level) noexcept nogil:
    """The entry for `gpa` in the host's table at hpa `base`, which is in the pool: all that leads there is ours."""
    return (<const u64 *>(<const u8 *>m.pool + (base - (<u64>SC_POOL_HFN << 12))))[level_index(gpa, level)]

cdef inline int host_glance(const sc_mem *m, const sc_paging *p, u64 gpa, u64 need, u64 *hpa) noexcept nogil:
    """Entries that a walk of the host's tables reads, and where it leads; -1 if the leaf has not all bits of `need`,
    one of which is P."""
    cdef u64 base = p.host_root
    cdef u64 entry
    cdef int read = p.host_top
    if p.host_top == 4:
        if base == 0 or gpa >> 48:
            return -1
    else:
        if base == 0:
            return -1
        entry = host_entry(m, base, gpa, 5)
        if not entry & PTE_P:
            return -1
        base = entry & pte_addr()
    entry = host_entry(m, base, gpa, 4)
    if not entry & PTE_P:
        return -1
    entry = host_entry(m, entry & pte_addr(), gpa, 3)
    if not entry & PTE_P:
        return -1
    if entry & PTE_PS:
        hpa[0] = (entry & pte_addr() & ~level_mask(3)) | (gpa & level_mask(3))
        return read - 2 if entry & need == need else -1
    entry = host_entry(m, entry & pte_addr(), gpa, 2)
    if not entry & PTE_P:
        return -1
    if entry & PTE_PS:
        hpa[0] = (entry & pte_addr() & ~level_mask(2)) | (gpa & level_mask(2))
        return read - 1 if entry & need == need else -1
    entry = host_entry(m, entry & pte_addr(), gpa, 1)
    hpa[0] = (entry & pte_addr()) | (gpa & 4095)
    return read if entry & need == need else -1

cdef inline u64 host_need(u32 access) noexcept nogil:
    """What a leaf of the host's has if an access has nothing to set there. PF_W is bit 1, as W is; D lies 5 above."""
    return PTE_P | PTE_A | (access & PF_W) | <u64>(access & PF_W) << 5

cdef inline bint nested_entry(sc_mem *m, const sc_paging *p, u64 gpa, sc_walk *w, u32 *references, u8 **at,
                              sc_gmode g) noexcept nogil:
    """The entry at `gpa` of a guest's table, through the host's tables; False where they refuse it. references: grows
    by the entries of theirs that were read."""
    cdef u64 hpa
    cdef int read
    if g.strict:
        read = host_glance(m, p, gpa, host_need(PF_W), &hpa)
        if read < 0:
            return False
        references[0] += read
    else:
        if host_walk(m, p, gpa, PF_W, npf_table(), w) != RC_OK:
            return False
        hpa = w.hpa
    at[0] = m.ram + (hpa - (m.ram_hfn << 12))
    return True

cdef inline int walk_step(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w, u64 *base, u64 *entry,
                          u64 *all_, u32 *references, int level, sc_gmode g) noexcept nogil:
    """The entry of `level`, in the table at base[0], which becomes the table below. all_: AND of the entries, bit 63
    inverted."""
    cdef u32 ps
    cdef u8 *table
    if g.reports:
        w.table[level] = base[0] >> 12
    if g.nested:
        if not nested_entry(m, p, base[0] + table_index(va, level, g.pte_size) * g.pte_size, w, references, &table, g):
            if g.reports:
                w.references -= 1   # the entry itself was not read
                w.entry[level] = 0
            return STEP_FAULT
        entry[0] = (<u64 *>table)[0] if g.pte_size == 8 else (<u32 *>table)[0]
    elif not walk_table(m, base[0], &table, g):     # nothing is present there
        if g.reports:
            w.references -= 1       # and no entry was read
            w.entry[level] = 0
            w.error_code = access_code(p, access)
        return STEP_FAULT
    else:
        entry[0] = ((<u64 *>table)[level_index(va, level)] if g.pte_size == 8
                    else (<u32 *>table)[table_index(va, level, 4)])
    if g.reports:
        w.entry[level] = entry[0]
    all_[0] &= entry[0] ^ pte_nx()
    if not (entry[0] ^ p.present_bits) & p.odd_bits[level]:
        if level == 1:
            return STEP_LEAF
        base[0] = entry[0] & (pte_addr() if g.pte_size == 8 else 0xFFFFF000U)
        return STEP_DOWN
    if not entry[0] & PTE_P:
        if g.reports:
            w.error_code = access_code(p, access)
        return STEP_FAULT
    ps = (entry[0] >> 7) & 1
    if entry[0] & p.reserved[ps][level]:
        if g.reports:
            w.error_code = access_code(p, access) | PF_P | PF_RSVD
        return STEP_FAULT
    # With nested paging this is no defect of KVM's but a processor's way, and leaves are not concerned.
    if (g.sets and not g.host and p.accessed_early and not entry[0] & PTE_A
            and not (g.nested and (level == 1 or (ps and (p.large_levels >> level) & 1)))):
        set_entry_bits(m, w, level, PTE_A, g)
        all_[0] &= ~<u64>PTE_A      # the end of the walk need not know
    if level == 1 or (ps and (p.large_levels >> level) & 1):
        return STEP_LEAF
    if g.strict:
        return STEP_FAULT           # an odd entry that leads on all the same: the walk proper may find that
    base[0] = entry[0] & (pte_addr() if g.pte_size == 8 else 0xFFFFF000U)
    return STEP_DOWN

cdef inline u64 leaf_address(u64 entry, u64 va, int level, sc_gmode g) noexcept nogil:
    """Where a leaf of `level` leads."""
    cdef u64 mask
    if g.pte_size == 8:
        mask = level_mask(level)
        return (entry & pte_addr() & ~mask) | (va & mask)
    if level == 1:
        return (entry & 0xFFFFF000U) | (va & 0xFFF)
    # PSE-36: bits 20:13 are physical bits 39:32
    return (entry & 0xFFC00000U) | (((entry >> 13) & 0xFF) << 32) | (va & 0x3FFFFF)

cdef inline void walk_update(sc_mem *m, u32 access, sc_walk *w, int level, sc_gmode g) noexcept nogil:
    """Set A in each entry of a complete walk that lacks it, and D in the leaf, of `level`, for a store."""
    w.found = w.entry[level]
    if not w.entry[level] & PTE_D and access & PF_W:
        w.dirtied = True
        set_entry_bits(m, w, level, PTE_A | PTE_D, g)
    while level <= g.top:
        if not w.entry[level] & PTE_A:
            set_entry_bits(m, w, level, PTE_A, g)
        level += 1

cdef inline int walk_end(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w, u64 *gpa, u32 *references,
                         u64 entry, u64 all_, int level, sc_gmode g) noexcept nogil:
    """Rights, address, and A and D, after the leaf `entry` at `level`."""
    cdef u32 acc = <u32>(all_ & (PTE_W | PTE_U)) | <u32>(all_ >> 63)
    cdef u32 pkey = pte_pkey(entry) if g.pte_size == 8 else 0
    cdef u32 fault
    # One branch for both: which accesses are stores cannot be foreseen. PF_W lies 5 bits below D.
    cdef bint clear = ((~all_ & PTE_A) | (~entry & <u64>((access & PF_W) << 5))) != 0
    if g.strict and clear:
        return RC_PF
    fault = rights_fault(p, acc, pkey, access)
    if g.strict and fault:
        return RC_PF
    gpa[0] = leaf_address(entry, va, level, g)
    if g.nested:
        references[0] += g.top + 1 - level      # and the host's entries that were read
    else:
        references[0] = g.top + 1 - level
    if g.reports:
        w.level = level
        w.access = acc
        w.pkey = pkey
        if fault:
            w.error_code = access_code(p, access) | fault
            return RC_PF
    if g.sets and clear:
        walk_update(m, access, w, level, g)
    return RC_OK

cdef inline int walk_stopped(sc_walk *w, int level, sc_gmode g) noexcept nogil:
    """The walk ended at `level`, with an error code."""
    if g.reports:
        w.level = level
        w.references += g.top + 1 - level
    return RC_PF

cdef inline int walk_body(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w, u64 *gpa, u32 *references,
                          sc_gmode g) noexcept nogil:
    """Walk `va`. RC_OK with gpa (of the shadow: the hpa) and references, the entries read; or RC_PF, with an error code
    in w where that is filled. w: NULL unless g.reports."""
    cdef u64 base
    cdef u64 entry = 0
    cdef u64 all_ = ~<u64>0
    cdef u8 *root_entry
    cdef int step
    if g.reports:
        w.va = va
        w.top = g.top
        w.pte_size = g.pte_size
        w.references = 0
        w.updated = 0
        w.dirtied = False
    if g.nested:
        references[0] = 0
    if g.pae_root:
        if g.nested:
            if not nested_entry(m, p, p.root + ((va >> 27) & 24), w, references, &root_entry, g):
                return RC_PF
            references[0] += 1
        base = p.pdpte[(va >> 30) & 3]
        if not base & PTE_P:
            if g.reports:
                w.error_code = access_code(p, access)
            return walk_stopped(w, 3, g)
        base &= pte_addr()
    else:
        base = p.root
    if g.top >= 5 and walk_step(m, p, va, access, w, &base, &entry, &all_, references, 5, g) != STEP_DOWN:
        return walk_stopped(w, 5, g)
    if g.top >= 4 and walk_step(m, p, va, access, w, &base, &entry, &all_, references, 4, g) != STEP_DOWN:
        return walk_stopped(w, 4, g)
    if g.top >= 3:
        step = walk_step(m, p, va, access, w, &base, &entry, &all_, references, 3, g)
        if step == STEP_LEAF:
            return walk_end(m, p, va, access, w, gpa, references, entry, all_, 3, g)
        if step == STEP_FAULT:
            return walk_stopped(w, 3, g)
    step = walk_step(m, p, va, access, w, &base, &entry, &all_, references, 2, g)
    if step == STEP_LEAF:
        return walk_end(m, p, va, access, w, gpa, references, entry, all_, 2, g)
    if step == STEP_FAULT:
        return walk_stopped(w, 2, g)
    if walk_step(m, p, va, access, w, &base, &entry, &all_, references, 1, g) == STEP_FAULT:
        return walk_stopped(w, 1, g)
    return walk_end(m, p, va, access, w, gpa, references, entry, all_, 1, g)

cdef int guest_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef int shadow_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef int host_walk(sc_mem *m, const sc_paging *p, u64 gpa, u32 access, u64 which, sc_walk *w) noexcept nogil
cdef int nested_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef int nested_glance(const sc_mem *m, const sc_paging *p, u64 va, u32 access, u64 *gpa) noexcept nogil
cdef int probe_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef bint pdptes_valid(const u64 *pdpte, int maxphyaddr) noexcept nogil
cdef void paging_reserved(sc_paging *p, int maxphyaddr, bint gbpages, bint pse, bint pse36) noexcept nogil
cdef int guest_glance(const sc_mem *m, const sc_paging *p, u64 va, u32 access, u64 *gpa) noexcept nogil
cdef int shadow_glance(const sc_mem *m, const sc_paging *p, u64 va, u32 access, u64 *hpa) noexcept nogil
cdef void paging_refused(sc_paging *p) noexcept nogil
