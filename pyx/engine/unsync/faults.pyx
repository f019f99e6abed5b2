"""Page-fault exits under design unsync, in the order in which Linux 6.1 goes about them."""
from shadowcore.engine.absent cimport is_marker, walk_mark
from shadowcore.engine.bits cimport PTE_A, PTE_D, PTE_P, PTE_PS, level_index, pte_addr
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_GUEST, EXIT_MMIO, EXIT_WRITE
from shadowcore.engine.emulate cimport walk_updated
from shadowcore.engine.features cimport FEAT_PKU
from shadowcore.engine.flushes cimport FLUSH_LINK, request_flush
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.invalidate cimport inject_fault
from shadowcore.engine.marks cimport marks_set
from shadowcore.engine.memory cimport mem_frame, mem_is_device, mem_is_rom, mem_pool_page, mem_touch, sc_no_frame
from shadowcore.engine.quirks cimport QUIRK_DEVICE_UNASKED, QUIRK_WP0_HIDES_USER
from shadowcore.engine.record cimport (
    RECORD_ACCESSED, RECORD_DEVICE_CHECKED, RECORD_DEVICE_HIT, RECORD_DIRTY, RECORD_EMULATED, RECORD_EXIT, record,
)
from shadowcore.engine.role cimport ROLE_ACCESS, ROLE_PKEY, role_field, role_level
from shadowcore.engine.spte cimport spte_link
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport (
    FOR_LOAD, FOR_STORE, LEAF_DEVICE, LEAF_PROTECTED, LEAF_SAME, device_is_stale, device_rights, is_tracked,
    leaf_level, leaf_set, prefetch_around, sync_below,
)
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, ACC_X, MODE_64, MODE_OFF, PF_I, PF_P, PF_RSVD, PF_U, PF_W, RC_EMULATE, RC_EXHAUSTED,
    RC_MMIO, RC_PF, RC_RETRY, SC_NONE, u32, u64,
)
from shadowcore.engine.unsync.roots cimport enter, last_resort, load_root, make_room, page_get, role_of, root_at
from shadowcore.engine.unsync.stores cimport other_instruction
from shadowcore.engine.walker cimport guest_walk, rights_fault, sc_walk, walk_above, walk_index
from shadowcore.engine.zap cimport entry_zap, leaf_drop


cdef u32 _last_entry(sc_mmu *mmu, const sc_vcpu *v, u64 va, bint used) noexcept nogil:
    """The last entry of the shadow on the way to va, or SC_NONE. used: the pages on the way are in use, and their
    floods end."""
    cdef u32 page = root_at(v, va)
    cdef u32 spte = SC_NONE
    cdef int level
    while page != SC_NONE:
        if used:
            mmu.pages[page].flood = 0
        level = role_level(mmu.pages[page].role)
        spte = page * 512 + level_index(va, level)
        if level == 1 or not mmu.table[spte] & PTE_P or mmu.table[spte] & PTE_PS:
            break
        page = mem_pool_page(mmu.table[spte])
    return spte


cdef int _inject(sc_mmu *mmu, sc_vcpu *v, u64 va, sc_walk *w) noexcept nogil:
    inject_fault(mmu, v, va, w.error_code)
    count_exit(mmu, v.number, EXIT_GUEST, va)
    enter(mmu, v)
    return RC_PF


cdef void _walked(sc_mmu *mmu, const sc_vcpu *v, const sc_walk *w) noexcept nogil:
    """A walk of the guest's tables set A and D: recorded from the top down."""
    cdef int level
    cdef u64 gpa
    mmu.stats.guest_walk_references += w.references
    if not w.updated:
        return
    if mmu.ring != NULL:
        for level in range(w.top, w.level - 1, -1):
            if w.updated >> level & 1:
                gpa = (w.table[level] << 12) + walk_index(w, level) * w.pte_size
                if level > w.level or not w.found & PTE_A:
                    record(mmu, RECORD_ACCESSED, gpa, 0, 0)
                if level == w.level and w.dirtied:
                    record(mmu, RECORD_DIRTY, gpa, 0, 0)
    walk_updated(mmu, v, w)


cdef int _device(sc_mmu *mmu, sc_vcpu *v, u32 access, u32 spte, u64 va, sc_walk *w) noexcept nogil:
    """An exit at an entry that remembers a device: no walk, unless the rights that are remembered do not suffice."""
    cdef u64 value = mmu.table[spte]
    cdef bint known = v.device_va != 0 and v.device_va == va & ~<u64>4095
    if v.guest.mode == MODE_OFF:
        known = v.device_gfn != 0 and v.device_gfn == va >> 12
    mmu.stats.pf_mmio_spte_hit += 1
    if not known or v.device_generation != mmu.generation:
        v.device_generation = mmu.generation
        v.device_gfn = (value & pte_addr()) >> 12
        v.device_rights = device_rights(value)
        v.device_va = va & ~<u64>4095
        record(mmu, RECORD_DEVICE_CHECKED, 0, 0, 1)
        record(mmu, RECORD_DEVICE_HIT, v.device_gfn, v.device_rights, 0)
    return _emulate_device(mmu, v, access, va, w)


cdef bint _device_suffices(const sc_mmu *mmu, const sc_vcpu *v, u32 access) noexcept nogil:
    """What is remembered of a device's page allows the access, without a walk of the guest's tables."""
    if access & PF_I or not v.device_va or rights_fault(&v.guest, v.device_rights, 0, access):
        return False
    if mmu.quirks & QUIRK_DEVICE_UNASKED:
        return True
    return not (access & PF_W and not v.device_rights & ACC_W or v.guest.pke and v.device_rights & ACC_U)


cdef int _emulate_device(sc_mmu *mmu, sc_vcpu *v, u32 access, u64 va, sc_walk *w) noexcept nogil:
    """The emulator's own look at the operand of an access to a device."""
    mmu.stats.insn_emulation += 1
    record(mmu, RECORD_EMULATED, va, 0, 0)
    other_instruction(mmu, v)
    if v.guest.mode == MODE_OFF:
        w.gpa = va
    elif not _device_suffices(mmu, v, access):
        if guest_walk(mmu.mem, &v.guest, va, access, w) != 0:
            mmu.stats.guest_walk_references += w.references
            return _inject(mmu, v, va, w)
        _walked(mmu, v, w)
        if not mem_is_device(mmu.mem, w.gpa >> 12, access):
            mem_touch(mmu.mem, w.gpa >> 12, access & PF_W != 0)
            count_exit(mmu, v.number, EXIT_EMULATE, va)
            enter(mmu, v)
            return RC_EMULATE       # what was remembered lags: the emulator finds RAM there
    else:
        w.gpa = v.device_gfn << 12 | (va & 4095)
    count_exit(mmu, v.number, EXIT_MMIO, va)
    mmu.stats.pf_mmio += 1
    enter(mmu, v)
    return RC_MMIO


cdef bint _maps_its_own_table(const sc_walk *w, u64 gfn) noexcept nogil:
    """The guest's page holds one of the tables that lead to it: a large leaf would take W from itself for good."""
    cdef u64 mask = ~(((<u64>1 << (9 * (w.level - 1))) - 1))
    cdef int level
    for level in range(w.level, w.top + 1):
        if (gfn ^ w.table[level]) & mask == 0:
            return True
    return False


cdef void _link(sc_mmu *mmu, u32 spte, u32 child) noexcept nogil:
    if mmu.table[spte] & PTE_P:
        leaf_drop(mmu, spte)
        request_flush(mmu, FLUSH_LINK)
    spte_link(mmu, spte, child)
    if mmu.pages[child].unsync or mmu.pages[child].unsync_children:
        marks_set(mmu, spte)


cdef int _fetch(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w, u32 rights, u32 pkey, u32 *spte,
                bint *linked) noexcept nogil:
    """Link what leads to va, and set the leaf: LEAF_*, or RC_EXHAUSTED. w: the complete walk of the guest's tables;
    with paging off, none."""
    cdef u64 gfn = w.gpa >> 12
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef bint off = v.guest.mode == MODE_OFF
    cdef int last = 3 if off else w.level      # no page above that level of the guest is direct
    cdef u32 page = root_at(v, va)
    cdef u32 child
    cdef int goal, level, made
    cdef u64 value
    linked[0] = False
    if page == SC_NONE:             # one of four that was let go, or never found room
        if not load_root(mmu, v, <int>(va >> 30) & 3):
            return RC_EXHAUSTED
        page = root_at(v, va)
    level = role_level(mmu.pages[page].role)
    while level > last:
        mmu.pages[page].flood = 0
        spte[0] = page * 512 + level_index(va, level)
        value = mmu.table[spte[0]]
        if not value & PTE_P or value & PTE_PS:
            child = page_get(mmu, v, w.table[level - 1],
                             role_of(mmu, v, va, level - 1, False, walk_above(w, level - 1)))
            if child == SC_NONE:
                return RC_EXHAUSTED
            # The guest need not flush where an entry was not present: what is linked has to be right.
            if mmu.pages[child].unsync_children:
                sync_below(mmu, v, child)
            _link(mmu, spte[0], child)
            linked[0] = True
        page = mem_pool_page(mmu.table[spte[0]])
        level -= 1
    goal = 2 if off else w.level
    if not off and goal > 1 and mmu.rewrites and _maps_its_own_table(w, gfn) and (
            rights & ACC_W or (not v.guest.wp and not access & PF_U)):
        goal = 1
    goal = leaf_level(mmu, gfn, frame, goal)
    while True:
        mmu.pages[page].flood = 0
        spte[0] = page * 512 + level_index(va, level)
        if level == goal:
            break
        value = mmu.table[spte[0]]
        if value & PTE_P and not value & PTE_PS and not off:
            child = mem_pool_page(value)
            if role_field(mmu.pages[child].role, ROLE_ACCESS, ACC_ALL) != rights:
                entry_zap(mmu, spte[0])
                request_flush(mmu, FLUSH_LINK)
        value = mmu.table[spte[0]]
        if not value & PTE_P or value & PTE_PS:
            child = page_get(mmu, v, gfn & ~((<u64>1 << (9 * (level - 1))) - 1),
                             role_of(mmu, v, va, level - 1, True, rights) | pkey << ROLE_PKEY)
            if child == SC_NONE:
                return RC_EXHAUSTED
            _link(mmu, spte[0], child)
            linked[0] = True
        page = mem_pool_page(mmu.table[spte[0]])
        level -= 1
    made = leaf_set(mmu, v, spte[0], gfn & ~((<u64>1 << (9 * (goal - 1))) - 1), rights, pkey,
                    FOR_STORE if access & PF_W else FOR_LOAD)
    if made != LEAF_SAME:
        prefetch_around(mmu, v, spte[0])
    return made


cdef inline bint _key_forbids(const sc_vcpu *v, u32 access, u32 rights, u32 pkey) noexcept nogil:
    """The page's key keeps user mode from storing to it, and, but for CR0.WP, the supervisor too."""
    return (v.guest.pke and not v.guest.wp and not access & PF_U and rights & ACC_U
            and v.guest.pkru >> (2 * pkey) & 2)


cdef int _emulate(sc_mmu *mmu, sc_vcpu *v, u32 access, u64 va, const sc_walk *w) noexcept nogil:
    mmu.stats.pf_emulate += 1
    mmu.stats.insn_emulation += 1
    record(mmu, RECORD_EMULATED, va, 0, 0)
    if v.retried_va != va or v.retried_rip != v.rip:
        v.retried = False
    if access & PF_W and mem_is_rom(mmu.mem, w.gpa >> 12):
        other_instruction(mmu, v)
        count_exit(mmu, v.number, EXIT_MMIO, va)
        mmu.stats.pf_mmio += 1
        enter(mmu, v)
        return RC_MMIO              # the emulator hands the store out
    count_exit(mmu, v.number, EXIT_EMULATE, va)
    return RC_EMULATE


cdef int page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """A page-fault exit, in the order in which Linux 6.1 goes about it."""
    cdef u64 va = hw.va
    cdef u32 spte
    cdef u64 gfn, old, changes
    cdef u32 rights
    cdef u32 pkey = 0
    cdef bint off = v.guest.mode == MODE_OFF
    cdef bint linked, stale
    cdef int made
    if not v.loaded:
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    spte = _last_entry(mmu, v, va, False)
    old = 0 if spte == SC_NONE or is_marker(mmu.table[spte]) else mmu.table[spte]
    record(mmu, RECORD_EXIT, va, hw.error_code | (PF_RSVD if old and not old & PTE_P else 0), 0)
    stale = old and not old & PTE_P and device_is_stale(mmu, old)
    if old and not old & PTE_P and not stale:
        return _device(mmu, v, access, spte, va, w)
    if stale:
        record(mmu, RECORD_DEVICE_CHECKED, 0, 0, 0)
    mmu.stats.pf_taken += 1
    if guest_walk(mmu.mem, &v.guest, va, access, w) != 0:
        mmu.stats.guest_walk_references += w.references
        if mmu.absent and hw.level == 1 and not w.error_code & PF_P:
            walk_mark(mmu, spte)
        return _inject(mmu, v, va, w)
    rights = ACC_ALL
    if not off:
        _walked(mmu, v, w)
        rights = w.access if w.entry[w.level] & PTE_D else w.access & ~<u32>ACC_W
        if v.features & FEAT_PKU and v.guest.mode >= MODE_64:
            pkey = w.pkey
    gfn = w.gpa >> 12
    if hw.error_code & PF_P and access & PF_W and not stale and is_tracked(mmu, gfn):
        _last_entry(mmu, v, va, True)
        return _emulate(mmu, v, access, va, w)
    changes = 0
    if mmu.mem.special:
        if access & PF_W and mem_is_rom(mmu.mem, gfn):
            return _emulate(mmu, v, access, va, w)
        if mmu.mem.host != NULL:
            changes = mmu.mem.host.changes
            mem_touch(mmu.mem, gfn, access & PF_W != 0)
            changes = mmu.mem.host.changes - changes
    if mem_frame(mmu.mem, gfn) == sc_no_frame():
        v.device_va = va & ~<u64>4095
        v.device_gfn = gfn
        v.device_rights = rights & (ACC_W | ACC_U)
        v.device_generation = mmu.generation
    elif access & PF_W and _key_forbids(v, access, rights, pkey):
        return _emulate(mmu, v, access, va, w)      # the processor, whose CR0.WP is on, would refuse the store for good
    elif access & PF_W and not rights & ACC_W and not v.guest.wp and not access & PF_U and not off:
        # A supervisor's store that no right allows: the leaf grants it, and is no longer the user's.
        if rights & ACC_U and (v.guest.smap or v.guest.pke) and not mmu.quirks & QUIRK_WP0_HIDES_USER:
            return _emulate(mmu, v, access, va, w)  # they ask whose the page is, and the leaf would not tell
        rights = (rights | ACC_W) & ~<u32>ACC_U
        if v.guest.smep:
            rights &= ~<u32>ACC_X
    if changes:
        # What the host said of the page holds no more: it is asked again at the next exit.
        count_exit(mmu, v.number, EXIT_WRITE if old & PTE_P else EXIT_FILL, va)
        enter(mmu, v)
        return RC_RETRY
    made = RC_EXHAUSTED
    if make_room(mmu, 1):
        made = _fetch(mmu, v, va, access, w, rights, pkey, &spte, &linked)
    if made == RC_EXHAUSTED:
        last_resort(mmu, v, 0 if v.guest.mode >= MODE_64 else <int>(va >> 30) & 3)
        made = _fetch(mmu, v, va, access, w, rights, pkey, &spte, &linked)
    if made == RC_EXHAUSTED:
        mmu.exhausted = v.number
        mmu.stats.pf_taken -= 1     # it comes to nothing, and is no exit
        return RC_EXHAUSTED
    if made == LEAF_DEVICE:
        mmu.stats.pf_emulate += 1
        return _emulate_device(mmu, v, access, va, w)
    if made == LEAF_PROTECTED:
        return _emulate(mmu, v, access, va, w)
    if made == LEAF_SAME:
        mmu.stats.pf_spurious += 1
    else:
        mmu.stats.pf_fixed += 1
    count_exit(mmu, v.number, EXIT_FILL if linked or not old & PTE_P else EXIT_WRITE, va)
    enter(mmu, v)
    return RC_RETRY
