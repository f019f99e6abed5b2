"""The faults that most faults are: a leaf is missing, or lacks W, or its table is missing; a guest table is stored to.

All of it in one go, for batches: the failed walk of the shadow, the guest's, the leaf, the repeated walk. It does what
fault.page_fault does and counts what that counts, or finds that the case is another one before it has changed anything.
"""
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_U, PTE_W, level_index, pte_addr, pte_pkey, pte_rights,
)
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_WRITE
from shadowcore.engine.fetch cimport leaf_install, leaf_replace
from shadowcore.engine.flushes cimport exit_flush
from shadowcore.engine.gmode cimport GLANCE, gmode_32, gmode_64, gmode_la57, gmode_pae, sc_gmode
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_frame, mem_frame_hpa, mem_guest_frame, sc_mem, sc_no_frame
from shadowcore.engine.pool cimport pool_get
from shadowcore.engine.quirks cimport QUIRK_NX_LEAF_ONLY, QUIRK_PROCESSOR_CODE, QUIRK_ROLE_WITHOUT_ACCESS
from shadowcore.engine.roots cimport make_role
from shadowcore.engine.spte cimport leaf_spte, spte_link
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport ACC_W, MODE_32, MODE_64, MODE_LA57, MODE_PAE, PF_U, PF_W, SC_NONE, u8, u32, u64
from shadowcore.engine.walker cimport (
    STEP_DOWN, STEP_LEAF, leaf_address, rights_fault, sc_paging, table_index, walk_step,
)


cdef enum:
    # Quirks by which more has to be looked at.
    UNUSUAL = QUIRK_ROLE_WITHOUT_ACCESS | QUIRK_NX_LEAF_ONLY | QUIRK_PROCESSOR_CODE


cdef inline bint _is_usual(const sc_mmu *mmu, const sc_vcpu *v, u32 below) noexcept nogil:
    """Nothing is set that looks into faults, and no page has to be recycled first. below: tables below the root."""
    return not (mmu.quirks & UNUSUAL or mmu.audit_points or mmu.fail_for or mmu.mem.logging
                or v.memo == NULL or (mmu.n_pte4 and mmu.n_pte8)
                or (mmu.by_table and (mmu.n_free < mmu.min_free or mmu.n_free < below)))


cdef inline u64 _plain(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, bint *emulate, int hw_top,
                       sc_gmode g) noexcept nogil:
    cdef sc_mem *m = mmu.mem
    cdef const sc_paging *p = &v.guest
    cdef u64 *spte = mmu.table
    cdef u64 base = v.hw.root if hw_top > 2 else v.hw.pdpte[(va >> 30) & 3] & pte_addr()
    cdef u64 all_ = ~<u64>0
    cdef u64 entry = 0
    cdef u64 old, value, gpa, frame
    cdef u64 table
    cdef u32 acc, above, granted, page
    cdef u32 link = SC_NONE         # the entry above the leaf table, if that is missing
    cdef u32 pkey = 0
    cdef int level
    cdef u8 *leaf
    if not _is_usual(mmu, v, hw_top - 1):
        return ~<u64>0
    # The processor's walk: to an entry of a leaf table.
    for level in range(hw_top, 0, -1):
        base -= <u64>SC_POOL_HFN << 12
        if base >= m.pool_pages << 12:
            return ~<u64>0
        spte = <u64 *>(<u8 *>m.pool + base) + level_index(va, level)
        base = spte[0] & pte_addr()
        if level > 1 and not spte[0] & PTE_P:
            if level > 2 or spte[0] or not mmu.by_table:
                return ~<u64>0
            link = <u32>(spte - mmu.table)
            break
    old = spte[0]
    if old and (not old & PTE_P or not rights_fault(&v.hw, pte_rights(old), pte_pkey(old), access)):
        return ~<u64>0              # a device, or no fault
    # The guest's: to a page of 4 KiB, with nothing to set but D.
    base = p.pdpte[(va >> 30) & 3] & pte_addr() if g.pae_root else p.root
    if g.pae_root and not p.pdpte[(va >> 30) & 3] & PTE_P:
        return ~<u64>0
    if g.top >= 5 and walk_step(m, p, va, access, NULL, &base, &entry, &all_, 5, g) != STEP_DOWN:
        return ~<u64>0
    if g.top >= 4 and walk_step(m, p, va, access, NULL, &base, &entry, &all_, 4, g) != STEP_DOWN:
        return ~<u64>0
    if g.top >= 3 and walk_step(m, p, va, access, NULL, &base, &entry, &all_, 3, g) != STEP_DOWN:
        return ~<u64>0
    if walk_step(m, p, va, access, NULL, &base, &entry, &all_, 2, g) != STEP_DOWN:
        return ~<u64>0
    table = base >> 12
    above = <u32>(all_ & (PTE_W | PTE_U)) | <u32>(all_ >> 63)
    leaf = mem_guest_frame(m, base) + table_index(va, 1, g.pte_size) * g.pte_size
    if walk_step(m, p, va, access, NULL, &base, &entry, &all_, 1, g) != STEP_LEAF or not all_ & PTE_A:
        return ~<u64>0
    acc = <u32>(all_ & (PTE_W | PTE_U)) | <u32>(all_ >> 63)
    if g.pte_size == 8:
        pkey = pte_pkey(entry)
    if rights_fault(p, acc, pkey, access) or access & PF_W & ~acc:
        return ~<u64>0              # the guest's fault, or a store that CR0.WP = 0 lets pass
    gpa = leaf_address(entry, va, 1, g)
    frame = mem_frame(m, gpa >> 12)
    if frame == sc_no_frame():
        return ~<u64>0
    emulate[0] = False
    if link != SC_NONE and (mmu.frames[frame].shadowed or gpa >> 12 == table):
        return ~<u64>0
    if mmu.frames[frame].shadowed:
        # A guest table. A store by supervisor code that changes nothing in the shadow but by itself is emulated.
        if not access & PF_W or access & PF_U or not entry & PTE_D or mmu.can_emulate != NULL:
            return ~<u64>0
        emulate[0] = True
    if access & PF_W:
        entry |= PTE_D
    granted = acc if entry & PTE_D and not emulate[0] else acc & ~<u32>ACC_W
    value = leaf_spte(mem_frame_hpa(m, frame), acc, granted, (entry & (PTE_A | PTE_D | PTE_G))
                      | (<u64>pkey << 59 if g.top >= 4 else 0) | (old & (PTE_A | PTE_D)))
    if emulate[0]:
        if value != old:
            return ~<u64>0
        count_exit(mmu, v.number, EXIT_EMULATE, va)
        exit_flush(mmu)
        mmu.stats.pf_taken += 1
        mmu.stats.pf_fixed += 1
        mmu.stats.accesses += 1
        mmu.stats.walk_references += hw_top
        mmu.stats.guest_walk_references += g.top
        return gpa
    if rights_fault(&v.hw, pte_rights(value), pte_pkey(value), access):
        return ~<u64>0              # what the guest allows no leaf can grant: to be emulated
    # From here on it is one.
    if link != SC_NONE:
        page = pool_get(mmu, table, make_role(mmu, v, va, 1, False, above))
        spte_link(mmu, link, page)
        spte = mmu.table + <u64>page * 512 + level_index(va, 1)
        old = spte[0]
        value |= old & (PTE_A | PTE_D)
        mmu.stats.walk_references -= 1      # the first walk did not come to the leaf
    leaf[0] |= <u8>(entry & PTE_D)
    value |= PTE_A | (PTE_D if access & PF_W else 0)
    page = <u32>(spte - mmu.table)
    if old & PTE_P:
        leaf_replace(mmu, v, page, gpa >> 12, value)
    else:
        leaf_install(mmu, v, page, gpa >> 12, value)
    count_exit(mmu, v.number, EXIT_WRITE if old and link == SC_NONE else EXIT_FILL, va)
    exit_flush(mmu)
    mmu.stats.pf_taken += 1
    mmu.stats.pf_fixed += 1
    mmu.stats.accesses += 1
    mmu.stats.walk_references += 2 * hw_top
    mmu.stats.guest_walk_references += g.top
    if mmu.flood_reset:
        v.flood_count = 0
    return gpa


cdef u64 fault_plain(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, bint *emulate) noexcept nogil:
    """The access `access` (PF_W, PF_U, PF_I) at the canonical address `va`, under a shadow MMU, if it is one that takes
    a plain fault and then succeeds, or has to be emulated: where it leads. Else all ones, and nothing has changed."""
    if v.guest.mode == MODE_64:
        return _plain(mmu, v, va, access, emulate, 4, gmode_64(False, GLANCE))
    if v.guest.mode == MODE_PAE:
        return _plain(mmu, v, va, access, emulate, 2, gmode_pae(False, GLANCE))
    if v.guest.mode == MODE_32:
        return _plain(mmu, v, va, access, emulate, 2, gmode_32(False, GLANCE))
    if v.guest.mode == MODE_LA57:
        return _plain(mmu, v, va, access, emulate, 5, gmode_la57(False, GLANCE))
    return ~<u64>0
