"""The fault path: link the levels of a shadow walk and install its leaf."""
from shadowcore.engine.bits cimport CR4_PGE, PTE_A, PTE_D, PTE_G, PTE_P, PTE_W, pte_addr
from shadowcore.engine.flushes cimport FLUSH_LEAF, request_flush
from shadowcore.engine.memory cimport mem_leaf_frame, mem_slot
from shadowcore.engine.quirks cimport QUIRK_GLOBAL_WITHOUT_PGE, QUIRK_RMAP_LEAK
from shadowcore.engine.rmap cimport rmap_add, rmap_remove
from shadowcore.engine.spte cimport spte_is_writable, spte_put, spte_wipe
from shadowcore.engine.state cimport memo_drop, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport ACC_W, MODE_OFF, u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef struct sc_leaf:                # outcome of one fault, as far as the shadow is concerned
    u32 spte                        # number of the leaf
    u32 large                       # of the entry that stands for the guest's large page, or SC_NONE
    bint filled                     # the leaf (or a link to it) was missing
    bint changed                    # a present leaf got other rights
    bint emulate                    # the access must be done by the emulator
    bint plain                      # filled as it is, with nothing for this access to add
    bint refused                    # quirk ROLE_WITHOUT_ACCESS: the leaf as it stands forbids the access

cdef inline u32 until_dirty(u32 rights, const sc_walk *w, int mode) noexcept nogil:
    """`rights`, less W while the guest's leaf is not dirty."""
    return rights if mode == MODE_OFF or w.entry[w.level] & PTE_D else rights & ~<u32>ACC_W

cdef inline void leaf_note(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 value) noexcept nogil:
    """What the page's header has to know of a leaf that gets `value`."""
    if not (value & PTE_G and (v.cr4 & CR4_PGE or mmu.quirks & QUIRK_GLOBAL_WITHOUT_PGE)):
        mmu.pages[spte >> 9].nonglobal = True
    if value & PTE_P:
        mmu.pages[spte >> 9].slots |= <u64>1 << mem_slot(mmu.mem, gfn)

cdef inline void leaf_install(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 value) noexcept nogil:
    """Fill an entry that is not present, for `gfn`."""
    if mmu.table[spte]:
        spte_wipe(mmu, spte)
    spte_put(mmu, spte, value)
    leaf_note(mmu, v, spte, gfn, value)
    if spte_is_writable(value):
        rmap_add(mmu, spte)

cdef inline void leaf_replace(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 value) noexcept nogil:
    """Give a present leaf another value; its record in the reverse map follows W."""
    cdef u64 old = mmu.table[spte]
    cdef bint was = spte_is_writable(old)
    cdef bint same = (old ^ value) & pte_addr() == 0
    cdef bint now = spte_is_writable(value)
    leaf_note(mmu, v, spte, gfn, value)
    if was and not (now and same):
        if mmu.quirks & QUIRK_RMAP_LEAK and same:
            mmu.frames[mem_leaf_frame(mmu.mem, old)].stale += 1
        else:
            request_flush(mmu, FLUSH_LEAF)
        rmap_remove(mmu, spte)
    elif not same:
        request_flush(mmu, FLUSH_LEAF)
    if (old ^ value) & ~<u64>(PTE_A | PTE_D | PTE_W) or was and not now:
        memo_drop(mmu)
    mmu.table[spte] = value
    if now and not (was and same):
        rmap_add(mmu, spte)

cdef int fetch(sc_mmu *mmu, sc_vcpu *v, u32 access, bint refused, const sc_walk *hw, sc_walk *w,
               sc_leaf *leaf) noexcept nogil
