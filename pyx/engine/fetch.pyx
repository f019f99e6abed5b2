"""From a guest walk to a shadow leaf: roles, links, rights.

The rights of a leaf are those of the guest walk, less W while the guest's leaf is not dirty (so that the first store
is seen), less W while the frame is a shadowed guest table (so that every store to it is seen).
"""
from libc.string cimport memset

from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_U, PTE_W, SPTE_MARK, level_index, pte_addr, pte_nx, pte_rights,
)
from shadowcore.engine.fetch cimport leaf_install, leaf_replace, sc_leaf, until_dirty
from shadowcore.engine.flushes cimport FLUSH_LINK, FLUSH_WITHHELD, request_flush
from shadowcore.engine.memory cimport (
    SC_POOL_HFN, mem_frame, mem_frame_hpa, mem_guest_frame, mem_mark_dirty, mem_pool_page, mem_unlogged, sc_no_frame,
)
from shadowcore.engine.pool cimport pool_unprotect
from shadowcore.engine.quirks cimport (
    QUIRK_DIRTY_LOST, QUIRK_NX_LEAF_ONLY, QUIRK_PAGING_OFF_UNPROTECTED, QUIRK_ROLE_WITHOUT_ACCESS,
    QUIRK_ROLE_WITHOUT_MODE,
)
from shadowcore.engine.roots cimport root_load, wp0_leaves
from shadowcore.engine.spte cimport leaf_remembers, leaf_spte, spte_drop, spte_link
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_U, ACC_W, ACC_X, MODE_64, MODE_OFF, MODE_PAE, PF_U, PF_W, RC_EXHAUSTED, RC_OK, SC_NONE, u8, u32, u64,
)
from shadowcore.engine.walker cimport rights_fault, sc_walk, walk_index


cdef int _link_path(sc_mmu *mmu, sc_vcpu *v, u64 va, const sc_walk *hw, const sc_walk *w,
                    sc_leaf *leaf) noexcept nogil:
    """Link every level down to the leaf table; leaf.spte is the entry for va, filled or not. Where the failed walk hw
    came by is linked. A link to the shadow of a guest table is right: a store to the guest's entry would have cut
    it."""
    cdef int level = v.guest.mode if v.guest.mode >= MODE_64 else 2
    cdef int slot = 0 if level > 2 else <int>(va >> 30) & 3
    cdef u32 page = v.roots[slot]
    cdef u32 spte, child, linked
    if page == SC_NONE:
        page = root_load(mmu, v, slot)
        if page == SC_NONE:
            return RC_EXHAUSTED
        leaf.filled = True
    elif hw != NULL and hw.level <= level and hw.level >= w.level:
        level = hw.level
        page = <u32>(hw.table[level] - SC_POOL_HFN)
    while level > 1:
        spte = page * 512 + level_index(va, level)
        linked = mem_pool_page(mmu.table[spte]) if mmu.table[spte] else SC_NONE
        child = linked
        if linked == SC_NONE or level <= w.level:
            child = mmu.design.child(mmu, v, va, level - 1, w, linked)
        if child == SC_NONE:
            return RC_EXHAUSTED
        if child != linked:
            if linked != SC_NONE:
                spte_drop(mmu, spte)
                request_flush(mmu, FLUSH_LINK)
            spte_link(mmu, spte, child)
            leaf.filled = True
        if level == w.level:
            leaf.large = spte
        page = child
        level -= 1
    leaf.spte = page * 512 + level_index(va, 1)
    return RC_OK


cdef inline u64 _kept_bits(const sc_walk *w, int mode) noexcept nogil:
    """Bits of the guest's leaf that the shadow leaf repeats: A, D, G and the protection key."""
    if mode == MODE_OFF:
        return 0
    return (w.entry[w.level] & (PTE_A | PTE_D | PTE_G)) | (<u64>w.pkey << 59 if mode >= MODE_64 else 0)


cdef inline u8 *_leaf_byte(sc_mmu *mmu, const sc_walk *w) noexcept nogil:
    """The low byte, with A and D, of the guest's leaf."""
    return mem_guest_frame(mmu.mem, w.table[w.level] << 12) + walk_index(w, w.level) * w.pte_size


cdef inline void _set_dirty(sc_mmu *mmu, sc_walk *w, bint on) noexcept nogil:
    """Set D in the guest's leaf, or take back what this very walk set."""
    if on and not w.entry[w.level] & PTE_D:
        w.dirtied = True
        _leaf_byte(mmu, w)[0] |= PTE_D
        w.entry[w.level] |= PTE_D
        mem_mark_dirty(mmu.mem, w.table[w.level])
    elif not on and w.dirtied:
        w.dirtied = False
        _leaf_byte(mmu, w)[0] &= <u8>~PTE_D
        w.entry[w.level] &= ~<u64>PTE_D


cdef inline void _mark_large(sc_mmu *mmu, const sc_vcpu *v, const sc_leaf *leaf) noexcept nogil:
    """The entry above the leaf stands for a large page of the guest."""
    if v.guest.mode != MODE_OFF and leaf.large != SC_NONE:
        mmu.table[leaf.large] |= SPTE_MARK


cdef int fetch(sc_mmu *mmu, sc_vcpu *v, u32 access, bint refused, const sc_walk *hw, sc_walk *w,
               sc_leaf *leaf) noexcept nogil:
    """Bring the shadow in line with the complete guest walk `w`, for `access`.

    hw: the failed walk of the shadow, whose path still stands, or NULL.
    refused: rights forbid the access (quirk TWO_EXITS fills the leaf all the same).
    RC_OK with *leaf, or RC_EXHAUSTED. A gpa in no slot leaves a marked entry that is not present.
    """
    cdef u64 va = w.va
    cdef u64 gfn = w.gpa >> 12
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef int mode = v.guest.mode
    cdef u32 guest = w.access
    cdef u32 granted
    cdef u64 old, value, hpa
    cdef u64 kept = _kept_bits(w, mode)
    cdef bint write = access & PF_W and not refused
    cdef bint shadowed, clean_before
    cdef bint taken = False
    memset(leaf, 0, sizeof(sc_leaf))
    leaf.large = SC_NONE
    if _link_path(mmu, v, va, hw, w, leaf) != RC_OK:
        return RC_EXHAUSTED
    if mmu.quirks & QUIRK_NX_LEAF_ONLY and mode >= MODE_PAE:
        guest = (guest & ~<u32>ACC_X) | (0 if w.entry[w.level] & pte_nx() else ACC_X)
    old = mmu.table[leaf.spte]
    leaf.refused = refused and not old
    if old and mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS and mode != MODE_OFF:
        # A leaf that is there is taken as it is, whatever the guest's tables say by now.
        taken = True
        guest = leaf_remembers(old)
        kept = old & (PTE_A | PTE_D | PTE_G)
        write = access & PF_W
        if rights_fault(&v.guest, guest, 0, access) and (write or not guest & ACC_U or old & PTE_U):
            leaf.refused = True
            _set_dirty(mmu, w, False)
            return RC_OK
        if write:
            _set_dirty(mmu, w, not old & PTE_W)
    if frame == sc_no_frame():
        if not old & PTE_P:
            leaf.filled = old == 0
            granted = until_dirty(guest, w, mode)
            if w.dirtied:
                kept &= ~<u64>PTE_D     # the processor's to set, and it never walks here
            value = leaf_spte(gfn << 12, guest, granted, kept) & ~<u64>PTE_P
            _mark_large(mmu, v, leaf)
            leaf_install(mmu, v, leaf.spte, gfn, value | SPTE_MARK)
        return RC_OK
    hpa = old & pte_addr() if taken and old & PTE_P else mem_frame_hpa(mmu.mem, frame)
    shadowed = mmu.frames[frame].shadowed != 0
    if mode == MODE_OFF and mmu.quirks & QUIRK_PAGING_OFF_UNPROTECTED:
        shadowed = False
    clean_before = mode != MODE_OFF and (w.dirtied or not w.entry[w.level] & PTE_D)
    leaf.plain = not old & PTE_P and (not write or (guest & ACC_W and not clean_before and not shadowed))
    if taken and (not write or old & PTE_W):
        granted = pte_rights(old) if write or old & PTE_U or not guest & ACC_U else guest & ~<u32>ACC_W
    elif write and not guest & ACC_W:
        # CR0.WP is 0: a supervisor store passed that no right allows.
        granted = guest
        leaf.emulate = True
        if wp0_leaves(&v.guest) or mmu.quirks & QUIRK_ROLE_WITHOUT_MODE:
            granted = (guest if shadowed else guest | ACC_W) & ~<u32>ACC_U
            leaf.emulate = shadowed
    else:
        granted = until_dirty(guest, w, mode)
        if granted & ACC_W and shadowed:
            if old == 0 and not clean_before:
                request_flush(mmu, FLUSH_WITHHELD)      # W was about to be granted (patch 31)
            if write and access & PF_U:
                # User mode does not edit page tables: the frame has become something else (patch 27).
                pool_unprotect(mmu, gfn)
                if _link_path(mmu, v, va, NULL, w, leaf) != RC_OK:
                    return RC_EXHAUSTED
                old = mmu.table[leaf.spte]
                shadowed = mmu.frames[frame].shadowed != 0      # still: a root in use
            if shadowed:
                granted &= ~<u32>ACC_W
                leaf.emulate = write
    if granted & ACC_W and not write and mem_unlogged(mmu.mem, gfn):
        granted &= ~<u32>ACC_W      # the store, when it comes, is to be seen by the dirty log
    if leaf.emulate and mmu.quirks & QUIRK_DIRTY_LOST:
        _set_dirty(mmu, w, False)
        kept = (kept & ~<u64>PTE_D) | (w.entry[w.level] & PTE_D)
    value = leaf_spte(hpa, guest if mode != MODE_OFF else 0, granted, kept)
    if not old & PTE_P:
        leaf.filled = True
        _mark_large(mmu, v, leaf)
        leaf_install(mmu, v, leaf.spte, gfn, value)
    else:
        value |= old & (PTE_A | PTE_D)
        leaf.changed = (value ^ old) & ~<u64>(PTE_A | PTE_D) != 0
        if not mmu.by_table:
            _mark_large(mmu, v, leaf)
        leaf_replace(mmu, v, leaf.spte, gfn, value)
    if value & PTE_W:
        mem_mark_dirty(mmu.mem, gfn)
    return RC_OK
