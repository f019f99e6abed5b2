"""Design `flush`: shadow pages belong to linear addresses of a vcpu, and lag behind the guest's tables as a TLB does.

All pages are direct, so no guest table is protected. A load of CR3 zaps the leaf tables with a leaf that lacks G, other
loads zap all; INVLPG exits. The roots are the same for every CR3.
"""
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_W, SPTE_MARK, level_index, level_mask, pte_addr, pte_pkey,
)
from shadowcore.engine.counters cimport EXIT_CR0, EXIT_CR3, EXIT_CR4, EXIT_EFER, EXIT_INVLPG
from shadowcore.engine.fast cimport fault_fast
from shadowcore.engine.flushes cimport FLUSH_FAULT, FLUSH_INVLPG, exit_flush, request_flush
from shadowcore.engine.memory cimport mem_frame, mem_frame_hpa, mem_pool_page, sc_no_frame
from shadowcore.engine.pool cimport pool_design, pool_get, pool_zap
from shadowcore.engine.role cimport role_level
from shadowcore.engine.roots cimport make_role, roots_load, roots_release, slot_changed, slot_changes
from shadowcore.engine.spte cimport leaf_guest_rights, spte_drop
from shadowcore.engine.state cimport linear_exists, sc_loaded, sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport INVPCID_ADDRESS, INVPCID_ALL, INVPCID_NOT_GLOBAL
from shadowcore.engine.types cimport ACC_ALL, MODE_32, MODE_64, MODE_OFF, PF_P, PF_RSVD, RC_OK, SC_NONE, u16, u32, u64
from shadowcore.engine.walker cimport probe_walk, sc_walk


cdef u64 _linear_gfn(const sc_vcpu *v, u64 va, int level) noexcept nogil:
    """Key of the page of `level` that serves `va`: linear addresses, in units of 4 KiB, of that vcpu."""
    return (((va & ~level_mask(level + 1)) >> 12) & (((<u64>1) << 52) - 1)) | (<u64>v.number << 52)


cdef bint _root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil:
    gfn[0] = _linear_gfn(v, <u64>slot << 30, v.guest.mode if v.guest.mode >= MODE_64 else 2)
    direct[0] = True
    return True


cdef u32 _child(sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, const sc_walk *w, u32 linked) noexcept nogil:
    """A page that is linked serves the address whatever the guest's tables say."""
    if linked != SC_NONE:
        return linked
    return pool_get(mmu, _linear_gfn(v, va, level), make_role(mmu, v, va, level, True, ACC_ALL))


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """The leaf tables that hold a leaf without G are zapped; upper levels stay."""
    cdef u32 number = mmu.old
    cdef u32 previous
    if v.guest.mode == MODE_OFF:
        return
    mmu.stats.tlb_flush += 1        # the flush itself is the CR3 load's: see registers
    exit_flush(mmu)
    while number != SC_NONE:
        previous = mmu.pages[number].prev
        if mmu.pages[number].nonglobal:
            pool_zap(mmu, number)
        number = previous


cdef void _reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """Another mode, or other rules: everything goes."""
    exit_flush(mmu)
    roots_release(mmu, v)
    mmu.design.zap_all(mmu)
    roots_load(mmu, v)


cdef bint _is_stale(sc_mmu *mmu, const sc_vcpu *v, u64 leaf, u64 va) noexcept nogil:
    """The leaf for `va` lets an access do what one that walks the guest's tables now would not do, or would do and set
    A or D."""
    cdef sc_walk w
    cdef u64 entry, frame
    cdef int level
    if not leaf & PTE_P:
        return False                # a device: each access exits, and the tables are walked
    if (probe_walk(mmu.mem, &v.guest, va, 0, &w) != RC_OK and w.error_code & (PF_P | PF_RSVD) != PF_P):
        return True                 # the tables lead nowhere
    entry = w.entry[w.level]
    frame = mem_frame(mmu.mem, w.gpa >> 12)
    if (frame == sc_no_frame() or leaf & pte_addr() != mem_frame_hpa(mmu.mem, frame)
            or leaf_guest_rights(leaf) != w.access or (leaf ^ entry) & PTE_G
            or (v.guest.mode >= MODE_64 and pte_pkey(leaf) != w.pkey)):
        return True
    if leaf & (PTE_W | PTE_D) and not entry & PTE_D:
        return True
    if leaf & PTE_A:
        for level in range(w.level, w.top + 1):
            if not w.entry[level] & PTE_A:
                return True
    return False


cdef bint _any_stale(sc_mmu *mmu, const sc_vcpu *v, u32 page, u64 va) noexcept nogil:
    """A leaf is stale in a page that serves `va`, or below it."""
    cdef int level = role_level(mmu.pages[page].role)
    cdef u32 index
    cdef u64 value
    va &= ~level_mask(level + 1)
    for index in range(512):
        value = mmu.table[page * 512 + index]
        if not value & PTE_P:
            continue
        if (_is_stale(mmu, v, value, va | <u64>index << 12) if level == 1
                else _any_stale(mmu, v, mem_pool_page(value), va | <u64>index << (9 * level + 3))):
            return True
    return False


cdef void _zap_subtree(sc_mmu *mmu, u32 page) noexcept nogil:
    """Zap a page and all below it: the pages belong to addresses and must not outlive a link."""
    cdef u32 spte
    if role_level(mmu.pages[page].role) > 1:
        for spte in range(page * 512, page * 512 + 512):
            if mmu.table[spte] & PTE_P:
                _zap_subtree(mmu, mem_pool_page(mmu.table[spte]))
    pool_zap(mmu, page)


cdef bint _drop_large(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 va, bint stale) noexcept nogil:
    """Zap what the upper entry `spte` leads to if that stands for a large page of the guest, or for half of one of
    4 MiB, and, if only what is `stale` is to go, a leaf of it is."""
    if not mmu.table[spte] & SPTE_MARK or (stale and not _any_stale(mmu, v, mem_pool_page(mmu.table[spte]), va)):
        return False
    _zap_subtree(mmu, mem_pool_page(mmu.table[spte]))
    return True


cdef bint _drop_leaves(sc_mmu *mmu, const sc_vcpu *v, u64 va, bint stale, int why) noexcept nogil:
    """Drop the leaf for `va`, or all leaves of its large page; if only what is `stale`, no page of which nothing is.
    True if something went."""
    cdef int level = v.hw.mode if v.hw.mode >= MODE_64 else 2
    cdef u32 page, spte
    cdef bint dropped = False
    if not linear_exists(v, va):
        return False
    page = v.roots[0 if level > 2 else <int>(va >> 30) & 3]
    while page != SC_NONE:
        spte = page * 512 + level_index(va, level)
        if level == 1:
            if mmu.table[spte] and not (stale and not _is_stale(mmu, v, mmu.table[spte], va)):
                spte_drop(mmu, spte)
                dropped = True
            break
        if v.guest.mode == MODE_32 and level == 2 and _drop_large(mmu, v, spte ^ 1, va ^ (level_mask(2) + 1), stale):
            dropped = True          # the other half
        if _drop_large(mmu, v, spte, va, stale):
            dropped = True
        if dropped:
            request_flush(mmu, why)
        if not mmu.table[spte]:
            break
        page = mem_pool_page(mmu.table[spte])
        level -= 1
    return dropped


cdef void _invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """The leaf goes, or all leaves of the large page; for an address that is not canonical nothing (SDM vol. 2)."""
    exit_flush(mmu)
    _drop_leaves(mmu, v, va, False, FLUSH_INVLPG)


cdef void _invpcid(sc_mmu *mmu, sc_vcpu *v, u32 kind, u16 pcid, u64 va) noexcept nogil:
    """What is shadowed is of the PCID that is loaded: each load of CR3 zaps the rest."""
    if kind == INVPCID_ALL:
        _reset(mmu, v, NULL)
    elif kind == INVPCID_NOT_GLOBAL or pcid == vcpu_pcid(v):
        if kind == INVPCID_ADDRESS:
            _invlpg(mmu, v, va)
        else:
            _new_cr3(mmu, v, NULL)
    else:
        exit_flush(mmu)


cdef bint _guest_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil:
    """Leaves that say what the tables say stay, as in the original: their loss would show in exits alone. (The original
    kept the others, too.)"""
    return v.guest.mode != MODE_OFF and _drop_leaves(mmu, v, va, True, FLUSH_FAULT)


cdef int _guest_level(const sc_mmu *mmu, const sc_walk *w) noexcept nogil:
    """The entry above the leaf table has a mark if it stands for a large page. (Of one of 1 GiB the mark is a level
    higher: a TLB knows its pieces as pages of 4 KiB, and where one is dropped, so is the whole TLB.)"""
    return 2 if w.entry[2] & SPTE_MARK else 1


cdef void flush_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design. Shadows may lag, so I1 and I2 do not hold."""
    mmu.shadow = True
    mmu.by_table = False
    pool_design(mmu)
    mmu.design.exits = 1 << EXIT_CR0 | 1 << EXIT_CR3 | 1 << EXIT_CR4 | 1 << EXIT_EFER | 1 << EXIT_INVLPG
    mmu.design.invariants = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 13
    mmu.design.new_cr3 = _new_cr3
    mmu.design.reset = _reset
    mmu.design.invlpg = _invlpg
    mmu.design.invpcid = _invpcid
    mmu.design.guest_fault = _guest_fault
    mmu.design.fast_fault = fault_fast
    mmu.design.root_of = _root_of
    mmu.design.child = _child
    mmu.design.guest_level = _guest_level
    mmu.design.slot_changes = slot_changes
    mmu.design.slot_changed = slot_changed
