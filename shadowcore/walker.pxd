"""The page walk: one body for every mode, over guest tables (gpas) or shadow tables (hpas).

Rules: SDM vol. 3, chapter 4. Entries are examined from the top; the first that is not present, or has a reserved
bit set, ends the walk. Rights are judged after a complete walk, on the AND of all levels. A walk that faults changes
nothing; one that succeeds sets A in each entry used and, for a write, D in the leaf.
"""
from shadowcore.bits cimport (
    PTE_A, PTE_D, PTE_P, PTE_PS, PTE_U, PTE_W, level_index, level_mask, pte_addr, pte_pkey, pte_rights,
)
from shadowcore.gmode cimport sc_gmode
from shadowcore.memory cimport mem_guest_frame, mem_host_frame, mem_mark_dirty, sc_mem
from shadowcore.types cimport (
    ACC_ALL, ACC_U, ACC_W, ACC_X, PF_I, PF_P, PF_PK, PF_RSVD, PF_U, PF_W, RC_OK, RC_PF, u8, u32, u64,
)

# What a walk needs to know of the processor's registers.
cdef struct sc_paging:
    u64 root                        # address of the top table (unused by PAE)
    u64 pdpte[4]                    # PAE: root entries, cached when CR3 was loaded
    u64 reserved[2][6]              # bits that must be 0 in a present entry, by [PS bit][level]
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
    bint accessed_early             # quirk: A is set on the way down, before rights are judged

cdef struct sc_walk:
    u64 gpa                         # where the access leads
    u64 entry[6]                    # entry found at each level
    u64 table[6]                    # gfn (shadow: hfn) of the table at each level
    u8 *slot[6]                     # host address of the entry at each level
    u32 index[6]                    # its number in the table
    u32 above[6]                    # ACC_* that the levels above allow
    u32 access                      # ACC_* of the whole walk
    u32 pkey                        # protection key of the leaf
    u32 error_code                  # PF_* when the walk failed
    u32 references                  # entries read
    u32 updated                     # bit L: A or D was set in the entry at level L
    bint dirtied                    # D was set in the leaf
    int level                       # level of the last entry examined
    int top                         # level of the first

cdef inline u32 rights_fault(const sc_paging *p, u32 acc, u32 pkey, u32 access) noexcept nogil:
    """0 if `access` (PF_W, PF_U, PF_I) is allowed by rights `acc`, else PF_P, with PF_PK where a key forbids it."""
    cdef bint user = (access & PF_U) != 0
    cdef u32 fault = 0
    cdef u32 key
    if access & PF_I:
        if not (acc & ACC_X) or (user and not (acc & ACC_U)) or (p.smep and not user and acc & ACC_U):
            fault = PF_P
        return fault
    if user and not (acc & ACC_U):
        fault = PF_P
    if access & PF_W and not (acc & ACC_W) and (user or p.wp):
        fault = PF_P
    if p.smap and not user and acc & ACC_U and not p.ac:
        fault = PF_P
    if p.pke and acc & ACC_U:
        key = (p.pkru >> (2 * pkey)) & 3
        if key & 1 or (key & 2 and access & PF_W and (user or p.wp)):
            fault = PF_P | PF_PK
    return fault

cdef inline u32 access_code(const sc_paging *p, u32 access) noexcept nogil:
    """The part of an error code that describes the access itself."""
    if access & PF_I and not p.fetch_coded:
        return access & ~<u32>PF_I
    return access

cdef inline void set_entry_bits(sc_mem *m, sc_walk *w, int level, u64 bits, sc_gmode g) noexcept nogil:
    w.entry[level] |= bits
    w.updated |= 1 << level
    w.slot[level][0] |= <u8>bits    # A and D are bits 5 and 6: the low byte of either entry size
    if not g.host:
        mem_mark_dirty(m, w.table[level])

cdef inline int walk_body(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w, sc_gmode g) noexcept nogil:
    """Walk `va`; RC_OK with gpa, access and levels in w, or RC_PF with error_code."""
    cdef u64 base, entry, mask
    cdef u32 acc = ACC_ALL
    cdef u32 fault
    cdef int level = g.top
    cdef int ps
    cdef u32 index
    cdef u8 *table
    w.top = level
    w.level = level
    w.references = 0
    w.updated = 0
    w.dirtied = False
    if g.pae_root:
        base = p.pdpte[(va >> 30) & 3]
        if not base & PTE_P:
            w.level = 3
            w.error_code = access_code(p, access)
            return RC_PF
        base &= pte_addr()
    else:
        base = p.root
    while True:
        w.level = level
        if g.pte_size == 8:
            index = level_index(va, level)
        else:
            index = <u32>(va >> (12 + 10 * (level - 1))) & 1023
        w.table[level] = base >> 12
        w.index[level] = index
        table = mem_host_frame(m, base) if g.host else mem_guest_frame(m, base)
        if table == NULL:           # no memory behind the table: nothing is present there
            w.entry[level] = 0
            w.error_code = access_code(p, access)
            return RC_PF
        entry = (<u64 *>table)[index] if g.pte_size == 8 else (<u32 *>table)[index]
        w.references += 1
        w.entry[level] = entry
        w.slot[level] = table + index * g.pte_size
        w.above[level] = acc
        if not entry & PTE_P:
            w.error_code = access_code(p, access)
            return RC_PF
        ps = (entry >> 7) & 1
        if entry & p.reserved[ps][level]:
            w.error_code = access_code(p, access) | PF_P | PF_RSVD
            return RC_PF
        acc &= pte_rights(entry)
        if not g.silent and not g.host and p.accessed_early and not entry & PTE_A:
            set_entry_bits(m, w, level, PTE_A, g)
        if level == 1 or (ps and (p.large_levels >> level) & 1):
            break
        base = entry & pte_addr()
        level -= 1
    w.access = acc
    w.pkey = pte_pkey(entry) if g.pte_size == 8 else 0
    if g.pte_size == 8:
        mask = level_mask(level)
        w.gpa = (entry & pte_addr() & ~mask) | (va & mask)
    elif level == 1:
        w.gpa = (entry & 0xFFFFF000U) | (va & 0xFFF)
    else:                           # PSE-36: bits 20:13 are physical bits 39:32
        w.gpa = (entry & 0xFFC00000U) | (((entry >> 13) & 0xFF) << 32) | (va & 0x3FFFFF)
    fault = rights_fault(p, acc, w.pkey, access)
    if fault:
        w.error_code = access_code(p, access) | fault
        return RC_PF
    if g.silent:
        return RC_OK
    if not entry & PTE_D and access & PF_W:
        w.dirtied = True
        set_entry_bits(m, w, level, PTE_A | PTE_D, g)
    elif not entry & PTE_A:
        set_entry_bits(m, w, level, PTE_A, g)
    level += 1
    while level <= g.top:
        if not w.entry[level] & PTE_A:
            set_entry_bits(m, w, level, PTE_A, g)
        level += 1
    return RC_OK

cdef int guest_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef int shadow_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef int probe_walk(sc_mem *m, const sc_paging *p, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef bint pdptes_valid(const u64 *pdpte, int maxphyaddr) noexcept nogil
cdef void paging_reserved(sc_paging *p, int maxphyaddr, bint gbpages, bint pse, bint pse36) noexcept nogil
