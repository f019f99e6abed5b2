"""One page-fault exit: what is asked, what is found, what is decided, and the doing of it.

`leaf_decide` and `fault_decide` take the MMU and the vcpu as const: they change nothing but the decision. The general
way (fault.pyx) and the fast one (fast.pyx) differ in how they come to what is found; from there on both are this text.
What the fast way's guards have excluded is a constant there, and the compiler leaves it out.

The rights of a leaf are those of the guest's walk, less W while the guest's leaf is not dirty (so that the first store
is seen), less W while the frame is a shadowed guest table (so that every store to it is seen).
"""
from shadowcore.engine.bits cimport (
    CR4_PGE, PTE_A, PTE_D, PTE_G, PTE_P, PTE_U, PTE_W, SPTE_MARK, level_mask, pte_addr, pte_nx, pte_pkey, pte_rights,
)
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_GUEST, EXIT_MMIO, EXIT_WRITE, sc_stats
from shadowcore.engine.flushes cimport FLUSH_LEAF, exit_flush, request_flush
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.memory cimport (
    mem_frame_hpa, mem_is_rom, mem_leaf_frame, mem_mark_dirty, mem_may_write, mem_slot, mem_unlogged, sc_no_frame,
)
from shadowcore.engine.quirks cimport (
    QUIRK_DIRTY_LOST, QUIRK_GLOBAL_WITHOUT_PGE, QUIRK_NX_LEAF_ONLY, QUIRK_PAGING_OFF_UNPROTECTED, QUIRK_PROCESSOR_CODE,
    QUIRK_RMAP_LEAK, QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_ROLE_WITHOUT_MODE, QUIRK_TWO_EXITS,
)
from shadowcore.engine.rmap cimport rmap_add, rmap_remove
from shadowcore.engine.role cimport ROLE_DIRTY, ROLE_GLOBAL, ROLE_PKEY
from shadowcore.engine.roots cimport make_role, wp0_leaves
from shadowcore.engine.spte cimport leaf_guest_rights, leaf_spte, spte_is_writable, spte_put, spte_wipe
from shadowcore.engine.state cimport memo_drop, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_U, ACC_W, ACC_X, MODE_32, MODE_64, MODE_OFF, MODE_PAE, PF_P, PF_U, PF_W, SC_NONE, u8, u32, u64,
)
from shadowcore.engine.walker cimport access_code, rights_fault

cdef struct sc_fault:
    # Asked; never changed.
    u64 va                          # linear address, canonical and truncated
    u32 access                      # PF_W, PF_U, PF_I
    u32 code                        # error code of the processor's walk that failed; only quirks look at it
    int mode                        # MODE_* of the guest
    u32 quirks                      # those that are on, less those that the guards of the fast way exclude
    bint tlb                        # a TLB is modelled
    bint logging                    # some slot has a dirty log
    bint special                    # sc_mem.special
    # Found in the guest's tables, whose walk is complete.
    u64 gpa                         # where the walk leads
    u64 frame                       # frame of RAM there, or sc_no_frame(): a device
    u64 gpte                        # the guest's leaf as it is; paging off: D alone
    u64 table                       # gfn of the table that it is in
    u8 *low                         # its low byte, with A and D
    int level                       # its level; above 1 it is a large page
    u32 rights                      # ACC_* of the whole walk
    u32 pkey                        # protection key
    int read                        # guest entries read
    int walked                      # shadow entries read by the processor, as far as nobody has counted them
    bint refused                    # rights forbid the access; only with quirks is there more to do then
    bint dirtied                    # the walk has set D in the guest's leaf already
    # Found in the shadow, whose path is linked (fast way: is linked or is to be, at one place).
    u32 spte                        # number of the leaf
    u32 large                       # of the entry that stands for the guest's large page, or SC_NONE
    u64 old                         # the leaf as it is
    bint linked                     # a link on the way to it was missing
    bint unprotected                # what shadowed the frame was zapped for this very store
    # Decided.
    u64 value                       # the leaf as it comes to be
    u64 dirty                       # PTE_D or 0: the guest's leaf as it comes to be
    bint withheld                   # W is withheld from a new leaf: flush
    bint unprotect                  # zap what shadows the frame, link anew, decide again
    bint emulate                    # the store is one to a guest table
    bint changed                    # a present leaf gets other rights
    bint fill_only                  # a missing leaf is filled as it is, with nothing for this access to add
    bint forbidden                  # rights forbid the access, as far as the quirks let them
    bint repeats                    # the processor's next walk succeeds: it is counted, and sets A and D, right here
    u32 error_code                  # PF_*, for EXIT_GUEST
    int kind                        # EXIT_FILL to EXIT_MMIO: what the exit was

cdef inline u64 dirty_after(u64 gpte, u32 access) noexcept nogil:
    """PTE_D if the guest's leaf is dirty once `access` has passed, else 0. PF_W lies 5 bits below D."""
    return (gpte & PTE_D) | <u64>(access & PF_W) << 5

cdef inline u64 dirty_before(const sc_fault *f) noexcept nogil:
    """PTE_D if the guest's leaf was dirty before the fault, else 0."""
    return 0 if f.dirtied else f.gpte & PTE_D

cdef inline u32 _until_dirty(const sc_fault *f, u32 rights) noexcept nogil:
    """`rights`, less W while the guest's leaf is not dirty."""
    return rights if f.dirty else rights & ~<u32>ACC_W

cdef inline u64 direct_gfn(u64 gpa, int level, int mode) noexcept nogil:
    """First frame that the direct page of `level` on the way to `gpa` maps; of a 4 MiB page: that of the whole."""
    return (gpa & ~(<u64>0x3FFFFF if mode == MODE_32 and level == 1 else level_mask(level + 1))) >> 12

cdef inline u32 direct_role(const sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, u32 rights, u64 gpte,
                            u32 pkey) noexcept nogil:
    """Role of the direct page of `level` that stands for a part of the guest's large page: all that its leaves have in
    common, so that an entry that grants something else finds another page. gpte: with D as the access leaves it."""
    cdef bint dirty = v.guest.mode == MODE_OFF or gpte & PTE_D
    cdef u32 role = make_role(mmu, v, va, level, True, rights if dirty else rights & ~<u32>ACC_W)
    if v.guest.mode != MODE_OFF and not mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        role |= pkey << ROLE_PKEY
        if gpte & PTE_G:
            role |= 1 << ROLE_GLOBAL
        # A leaf that is W against the guest's rights (wp0) must not be found by an entry that is not dirty.
        if not rights & ACC_W and dirty and wp0_leaves(&v.guest):
            role |= 1 << ROLE_DIRTY
    return role

cdef inline void leaf_decide(const sc_mmu *mmu, const sc_vcpu *v, sc_fault *f) noexcept nogil:
    """The leaf's value, and D of the guest's leaf. f.unprotect: what is decided is only that something comes first."""
    cdef u32 write = 0 if f.refused else f.access & PF_W
    cdef bint taken = f.old != 0 and f.quirks & QUIRK_ROLE_WITHOUT_ACCESS and f.mode != MODE_OFF
    cdef u32 shadowed
    cdef u32 guest = f.rights
    cdef u32 granted
    cdef u64 kept = 0               # bits of the guest's leaf that the shadow leaf repeats
    cdef u64 hpa
    f.value = f.old
    f.withheld = f.unprotect = f.emulate = f.changed = f.fill_only = False
    f.forbidden = f.refused and (f.old == 0 or not f.quirks & QUIRK_ROLE_WITHOUT_ACCESS)
    if f.quirks & QUIRK_NX_LEAF_ONLY and f.mode >= MODE_PAE:
        guest = (guest & ~<u32>ACC_X) | (0 if f.gpte & pte_nx() else ACC_X)
    if taken:
        # A leaf that is there is taken as it is, whatever the guest's tables say by now.
        guest = leaf_guest_rights(f.old)
        write = f.access & PF_W
        if rights_fault(&v.guest, guest, 0, f.access) and (write or not guest & ACC_U or f.old & PTE_U):
            f.forbidden = True
            f.dirty = dirty_before(f)
            return
        if write:
            f.dirty = dirty_before(f) | (0 if f.old & PTE_W else PTE_D)
        kept = f.old & (PTE_A | PTE_D | PTE_G)
    elif f.mode != MODE_OFF:
        kept = (f.gpte & (PTE_A | PTE_G)) | f.dirty
        if f.mode >= MODE_64:
            kept |= <u64>f.pkey << 59
    if f.frame == sc_no_frame():
        if not f.old & PTE_P:
            if not dirty_before(f):
                kept &= ~<u64>PTE_D     # the processor's to set, and it never walks here
            f.value = (leaf_spte(f.gpa & ~<u64>4095, guest, _until_dirty(f, guest), kept) & ~<u64>PTE_P) | SPTE_MARK
        return
    hpa = f.old & pte_addr() if taken and f.old & PTE_P else mem_frame_hpa(mmu.mem, f.frame)
    shadowed = mmu.frames[f.frame].shadowed
    if f.mode == MODE_OFF and f.quirks & QUIRK_PAGING_OFF_UNPROTECTED:
        shadowed = 0
    if f.quirks & QUIRK_PROCESSOR_CODE:
        f.fill_only = not f.old & PTE_P and not f.unprotected and (
            not write or (guest & ACC_W and dirty_before(f) and not shadowed))
    if taken and (not write or f.old & PTE_W):
        granted = pte_rights(f.old) if write or f.old & PTE_U or not guest & ACC_U else guest & ~<u32>ACC_W
    elif write and not guest & ACC_W:
        # CR0.WP is 0: a supervisor store passed that no right allows.
        granted = guest
        f.emulate = True
        if wp0_leaves(&v.guest) or f.quirks & QUIRK_ROLE_WITHOUT_MODE:
            granted = (guest if shadowed else guest | ACC_W) & ~<u32>ACC_U
            f.emulate = shadowed != 0
    else:
        granted = _until_dirty(f, guest)
        if granted & ACC_W and shadowed:
            if not f.unprotected:
                # W was about to be granted (patch 31).
                f.withheld = f.old == 0 and dirty_before(f)
                # User mode does not edit page tables: the frame has become something else (patch 27).
                f.unprotect = write and f.access & PF_U
                if f.unprotect:
                    return
            granted &= ~<u32>ACC_W      # f.unprotected: a root in use still shadows it
            f.emulate = write != 0
    if f.logging and granted & ACC_W and not write and mem_unlogged(mmu.mem, f.gpa >> 12):
        granted &= ~<u32>ACC_W      # the store, when it comes, is to be seen by the dirty log
    if f.special and granted & ACC_W and not mem_may_write(mmu.mem, f.gpa >> 12, f.frame):
        granted &= ~<u32>ACC_W      # the host is to see the store
    if f.emulate and f.quirks & QUIRK_DIRTY_LOST:
        f.dirty = dirty_before(f)
        kept = (kept & ~<u64>PTE_D) | f.dirty
    f.value = leaf_spte(hpa, guest if f.mode != MODE_OFF else 0, granted, kept)
    if f.old & PTE_P:
        f.value |= f.old & (PTE_A | PTE_D)
        f.changed = (f.value ^ f.old) & ~<u64>(PTE_A | PTE_D) != 0

cdef inline void fault_decide(const sc_mmu *mmu, const sc_vcpu *v, sc_fault *f) noexcept nogil:
    """What the exit is, once the leaf is decided."""
    cdef bint device = f.frame == sc_no_frame()
    cdef u32 fault
    f.repeats = False
    if ((f.forbidden and ((f.code & PF_P and not f.changed) or not f.quirks & QUIRK_TWO_EXITS))
            or (device and (f.refused or f.forbidden))):
        f.kind = EXIT_GUEST
        f.error_code = access_code(&v.guest, f.access) | PF_P
        return
    if f.quirks & QUIRK_PROCESSOR_CODE and f.code & PF_P and f.fill_only and not device and f.mode != MODE_OFF:
        f.kind = EXIT_GUEST
        f.error_code = f.code
        return
    if device:
        f.kind = EXIT_MMIO
        return
    f.kind = EXIT_EMULATE
    if f.emulate:
        return
    fault = rights_fault(&v.hw, pte_rights(f.value), pte_pkey(f.value), f.access)
    if fault and not f.refused and not f.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        return                      # what the guest allows no leaf can grant to the processor, and no access can loop
    f.kind = EXIT_FILL if f.linked or (not f.old & PTE_P and f.value != f.old) else EXIT_WRITE
    # The processor's next walk has to be made where a TLB is modelled, which it fills, and where a leaf may be kept
    # that leads elsewhere than the guest's tables.
    f.repeats = not fault and not f.tlb and not f.quirks & QUIRK_ROLE_WITHOUT_ACCESS
    if f.repeats:
        f.walked += 2 if f.mode <= MODE_PAE else f.mode

cdef inline void leaf_note(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 value) noexcept nogil:
    """What the page's header has to know of a leaf that gets `value`."""
    if not (value & PTE_G and (v.cr4 & CR4_PGE or mmu.quirks & QUIRK_GLOBAL_WITHOUT_PGE)):
        mmu.pages[spte >> 9].nonglobal = True
    if value & PTE_P:
        mmu.pages[spte >> 9].slots |= <u64>1 << mem_slot(mmu.mem, gfn)

cdef inline void leaf_install(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 old, u64 value) noexcept nogil:
    """Fill the entry `old`, which is not present, for `gfn`."""
    if old:
        spte_wipe(mmu, spte)
    spte_put(mmu, spte, value)
    leaf_note(mmu, v, spte, gfn, value)
    if spte_is_writable(value):
        rmap_add(mmu, spte)

cdef inline void leaf_replace(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 old, u64 value) noexcept nogil:
    """Give the present leaf `old` another value; its record in the reverse map follows W."""
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

cdef inline void fault_count(sc_mmu *mmu, sc_vcpu *v, const sc_fault *f) noexcept nogil:
    """The exit in the counters, whatever its kind; for the embedder's eyes and the flood count it happens now."""
    cdef sc_stats *s = mmu.stats
    exit_flush(mmu)
    s.pf_taken += 1
    s.guest_walk_references += f.read
    s.walk_references += f.walked
    if f.kind == EXIT_GUEST:
        s.pf_guest += 1
    elif f.kind == EXIT_MMIO:
        s.pf_mmio += 1
    elif f.mode != MODE_OFF:
        s.pf_fixed += 1
    if f.kind == EXIT_WRITE and not f.changed:
        s.pf_spurious += 1
    if mmu.flood_reset and f.kind != EXIT_EMULATE and f.kind != EXIT_MMIO:
        v.flood_count = 0
    count_exit(mmu, v.number, f.kind, f.va)

cdef inline void leaf_commit(sc_mmu *mmu, const sc_vcpu *v, sc_fault *f) noexcept nogil:
    """Do what was decided, but for the counting: D of the guest's leaf, the leaf, what the next walk would set."""
    if (f.dirty ^ f.gpte) & PTE_D:  # for a store; or the walk set D, and it is taken back
        if not f.special or not mem_is_rom(mmu.mem, f.table):
            f.low[0] ^= PTE_D
        if f.logging and f.dirty:
            mem_mark_dirty(mmu.mem, f.table)
    if f.repeats:
        f.value |= PTE_A | (PTE_D if f.access & PF_W else 0)
    if f.value == f.old:
        return
    if f.large != SC_NONE and f.mode != MODE_OFF and not (f.old & PTE_P and mmu.by_table):
        mmu.table[f.large] |= SPTE_MARK
    if f.old & PTE_P:
        leaf_replace(mmu, v, f.spte, f.gpa >> 12, f.old, f.value)
    else:
        leaf_install(mmu, v, f.spte, f.gpa >> 12, f.old, f.value)
    if f.logging and spte_is_writable(f.value):
        mem_mark_dirty(mmu.mem, f.gpa >> 12)
