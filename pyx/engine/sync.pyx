"""Leaves of shadow pages that may be unsync: how they are made, and made right again.

A leaf table leaves sync at the first store to it: all shadow pages of it are marked, and leaves that map it get W. From
then on its leaves may lag, as a TLB may, until the guest flushes: sync_below then write-protects it and looks at every
leaf anew.
"""
from shadowcore.engine.absent cimport is_marker, marker_stays, page_mark, page_unmark
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_PS, PTE_W, SPTE_GENERATION, SPTE_GUEST_U, SPTE_GUEST_W, SPTE_MARK, SPTE_MMU_W,
    pte_addr, pte_nx, pte_pkey, pte_rights,
)
from shadowcore.engine.flushes cimport FLUSH_LEAF, request_flush
from shadowcore.engine.leaf cimport leaf_decide, leaf_install, sc_fault
from shadowcore.engine.marks cimport (
    marks_clear, marks_first, marks_next, marks_set_above, marks_walk, sc_unsync, sc_unsync_at,
)
from shadowcore.engine.memory cimport (
    mem_frame, mem_frame_hpa, mem_gfn, mem_host_level, mem_leaf_frame, mem_mark_dirty, mem_may_write,
    mem_pool_page, mem_slot, mem_touch, sc_no_frame,
)
from shadowcore.engine.pool cimport hash_bucket, shadows
from shadowcore.engine.quirks cimport QUIRK_DEVICE_UNASKED, QUIRK_ROLE_WITHOUT_NXE
from shadowcore.engine.record cimport RECORD_DEVICE, RECORD_LEAF, RECORD_UNSYNC, record, record_page, record_read_only
from shadowcore.engine.rmap cimport list_add, list_length, list_remove, rmap_write_protect
from shadowcore.engine.role cimport (
    ROLE_GLEVELS, ROLE_NXE, ROLE_PKEY, ROLE_QUADRANT, role_access, role_direct, role_field, role_level, role_pte_size,
)
from shadowcore.engine.roots cimport make_role
from shadowcore.engine.spte cimport leaf_gpte, leaf_gtable, leaf_guest_rights, spte_is_writable, spte_put, spte_wipe
from shadowcore.engine.state cimport LET_UNSYNC, LET_ZAP, memo_drop, sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport gpte_granting, leaf_bits, leaf_fill, leaf_key, leaf_value, leaf_writable
from shadowcore.engine.types cimport ACC_U, ACC_W, ACC_X, MODE_32, MODE_OFF, SC_NONE, u8, u32, u64
from shadowcore.engine.zap cimport (
    GENERATIONS, leaf_counted, leaf_drop, leaf_list, page_left_sync, zap_commit, zap_gfn, zap_prepare,
)


cdef bint is_tracked(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """The frame is a guest table above the leaves that has a shadow: stores to it are emulated."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u32 number
    if frame == sc_no_frame() or mmu.frames[frame].shadowed == 0:
        return False
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and role_level(mmu.pages[number].role) > 1:
            return True
        number = mmu.pages[number].hash_next
    return False


cdef bint _has_roles(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """The guest table has more than one shadow page."""
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef u32 n = 0
    while number != SC_NONE:
        n += shadows(mmu, number, gfn)
        number = mmu.pages[number].hash_next
    return n > 1


cdef bint _let_go(sc_mmu *mmu, u64 gfn, u64 frame, bint can_unsync, bint prefetch) noexcept nogil:
    """A leaf that maps `gfn` is about to get W: what shadows that frame becomes unsync. False: it must not."""
    cdef u32 number
    cdef int answer
    cdef bint asked = False
    if mmu.frames[frame].shadowed == 0:
        return True
    if is_tracked(mmu, gfn) or (mmu.one_role and _has_roles(mmu, gfn)):
        return False
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if shadows(mmu, number, gfn):
            if not can_unsync:
                return False
            if not mmu.pages[number].unsync:
                if prefetch:
                    return False
                if mmu.may_unsync != NULL and not asked:
                    answer = mmu.may_unsync(mmu.decider, gfn)
                    if answer != LET_UNSYNC:
                        return answer == LET_ZAP and zap_gfn(mmu, gfn)
                asked = True        # before the first page of the table is changed
                record_page(mmu, RECORD_UNSYNC, number)
                mmu.pages[number].unsync = True
                mmu.stats.mmu_unsync += 1
                mmu.stats.unsync_made += 1
                marks_set_above(mmu, number)
                if mmu.absent:
                    page_unmark(mmu, number)
        number = mmu.pages[number].hash_next
    return True


cdef bint table_let_go(sc_mmu *mmu, u64 gfn, u64 frame) noexcept nogil:
    """The guest stores to a table through a mapping of which nothing is known: what shadows it becomes unsync. False:
    the store has to be emulated."""
    return _let_go(mmu, gfn, frame, True, False)


cdef inline u64 _keys() noexcept nogil:
    """Bits 62:59 of a leaf."""
    return <u64>15 << 59


cdef u64 _make(sc_mmu *mmu, const sc_vcpu *v, int level, u64 gfn, u64 frame, u32 rights, u32 pkey, u64 old,
               bint may_write, bint prefetch, bint can_unsync, bint *protected) noexcept nogil:
    """The value of a leaf for `gfn`, in place of `old`, or of 0. may_write: as far as the host goes. protected: W is
    withheld."""
    cdef u64 value = leaf_bits(mmu, v, frame, rights, pkey)
    protected[0] = False
    if not prefetch:
        value |= PTE_A
    if level > 1:
        value |= PTE_PS
    if not rights & ACC_W or not may_write:
        return value
    if not spte_is_writable(old):
        if not _let_go(mmu, gfn, frame, can_unsync, prefetch):
            protected[0] = True
            return value
        value |= PTE_D
    mem_mark_dirty(mmu.mem, gfn)
    return value | PTE_W | SPTE_MMU_W


cdef inline u64 _withdraws(u64 old, u64 value) noexcept nogil:
    """Not 0 if a leaf's new value, which has SPTE_MMU_W if and only if it has W, takes something away that a TLB may
    hold: W, A, D."""
    return old & ~value & (PTE_A | PTE_D | SPTE_MMU_W)


cdef bint _replace(sc_mmu *mmu, u32 spte, u64 value) noexcept nogil:
    """Give a present leaf another value for the same frame; True if that asks for a flush."""
    cdef u64 old = mmu.table[spte]
    mmu.table[spte] = value
    memo_drop(mmu)
    return _withdraws(old, value) != 0


cdef void _fill_large(sc_mmu *mmu, u32 spte, int level, u64 value) noexcept nogil:
    """A leaf of `level`, above 1, for an entry that is 0."""
    cdef u32 *head = leaf_list(mmu, value, level)
    cdef u64 others = list_length(mmu, head[0])
    spte_put(mmu, spte, value)
    list_add(mmu, head, spte)
    leaf_counted(mmu, value, level, 1)
    if others > mmu.stats.max_mmu_rmap_size:
        mmu.stats.max_mmu_rmap_size = others


cdef void _put_device(sc_mmu *mmu, u32 spte, u64 gfn, u32 rights) noexcept nogil:
    if mmu.table[spte]:
        leaf_drop(mmu, spte)
    spte_put(mmu, spte, gfn << 12 | (<u64>rights & (ACC_W | ACC_U)) << 9 | SPTE_MARK
             | (mmu.generation & GENERATIONS) << SPTE_GENERATION)


cdef void _remember_device(sc_mmu *mmu, u32 spte, u64 gfn, u32 rights) noexcept nogil:
    record(mmu, RECORD_DEVICE, gfn, (rights & (ACC_W | ACC_U)) | ACC_X, 0)
    _put_device(mmu, spte, gfn, rights)


cdef bint device_is_stale(const sc_mmu *mmu, u64 value) noexcept nogil:
    """Memory slots have changed since the entry was made."""
    return (value >> SPTE_GENERATION ^ mmu.generation) & GENERATIONS


cdef u32 device_rights(u64 value) noexcept nogil:
    """ACC_W and ACC_U that an entry which remembers a device has kept."""
    return (ACC_W if value & SPTE_GUEST_W else 0) | (ACC_U if value & SPTE_GUEST_U else 0)


cdef inline int _put(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u32 rights, u32 pkey, int what,
                     bint events) noexcept nogil:
    """leaf_set; events: recorded, a constant."""
    cdef int level = role_level(mmu.pages[spte >> 9].role)
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u64 old = mmu.table[spte]
    cdef u64 before = 0
    cdef u64 value
    cdef bint may_write
    cdef bint flush = False
    cdef bint protected
    cdef int made = LEAF_SET
    if frame == sc_no_frame():
        mmu.stats.pf_mmio_spte_created += 1
        if events:
            _remember_device(mmu, spte, gfn, rights)
        else:
            _put_device(mmu, spte, gfn, rights)
        return LEAF_DEVICE
    if old & PTE_P:
        if level > 1 and not old & PTE_PS:
            # The table that a large leaf replaces.
            list_remove(mmu, &mmu.pages[mem_pool_page(old)].parents, spte)
            spte_wipe(mmu, spte)
            flush = True
        elif mem_leaf_frame(mmu.mem, old) != frame:
            leaf_drop(mmu, spte)
            flush = True
    elif old and (not is_marker(old) or marker_stays(mmu, spte, PTE_P)):
        spte_wipe(mmu, spte)
        # A device was there, before memory slots changed. KVM takes rights that it remembers for those of a leaf.
        if old & SPTE_GUEST_W and mmu.frames[frame].shadowed == 0:
            before = PTE_P | PTE_W
    old = mmu.table[spte]
    may_write = mem_may_write(mmu.mem, gfn, frame)
    value = _make(mmu, v, level, gfn, frame, rights, pkey, before | old, may_write,
                  what == FOR_NEIGHBOUR, True, &protected)
    if old == value:
        made = LEAF_SAME
    else:
        if old:
            flush |= _replace(mmu, spte, value)
        elif level == 1:
            leaf_fill(mmu, spte, frame, value)
        else:
            _fill_large(mmu, spte, level, value)
        if events:
            record(mmu, RECORD_LEAF, gfn, value if may_write else value | record_read_only(), level)
    if flush:
        request_flush(mmu, FLUSH_LEAF)
    return LEAF_PROTECTED if protected and what == FOR_STORE else made


cdef int leaf_set(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u32 rights, u32 pkey, int what) noexcept nogil:
    """Set the leaf at `spte`, for the pages from `gfn` on that its level covers, whose rights are those of the guest's
    tables: LEAF_*."""
    return _put(mmu, v, spte, gfn, rights, pkey, what, True)


cdef int leaf_put(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u32 rights, int what) noexcept nogil:
    """leaf_set, of which the caller records what there is to tell."""
    return _put(mmu, v, spte, gfn, rights, 0, what, False)


cdef u64 direct_page_gfn(const sc_mmu *mmu, u32 spte) noexcept nogil:
    """The first gfn of what an entry of a direct page stands for."""
    return mmu.pages[spte >> 9].gfn + (<u64>(spte & 511) << (9 * (role_level(mmu.pages[spte >> 9].role) - 1)))


cdef inline u64 _gpte_gfn(const sc_mmu *mmu, u32 spte, u64 gpte) noexcept nogil:
    return (gpte & (pte_addr() if role_pte_size(mmu.pages[spte >> 9].role) == 8 else 0xFFFFF000U)) >> 12


cdef inline u32 _gpte_rights(const sc_mmu *mmu, u32 spte, u64 gpte) noexcept nogil:
    return role_access(mmu.pages[spte >> 9].role) & pte_rights(gpte_granting(gpte))


cdef inline bint _serves(const sc_vcpu *v, u64 gpte) noexcept nogil:
    """A leaf can be made of the guest's entry without a walk: it is present, accessed, and has no reserved bit set."""
    return gpte & (PTE_P | PTE_A) == (PTE_P | PTE_A) and not gpte & v.guest.reserved[(gpte >> 7) & 1][1]


cdef inline bint _is_logged(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    return mmu.mem.logging and mmu.mem.slots[mem_slot(mmu.mem, gfn)].dirty != NULL


cdef int leaf_level(const sc_mmu *mmu, u64 gfn, u64 frame, int most) noexcept nogil:
    """The level of the leaf that can be made for a guest's page of level `most`."""
    cdef u64 first, n
    cdef int slot
    if frame == sc_no_frame() or _is_logged(mmu, gfn):
        return 1
    slot = mem_slot(mmu.mem, gfn)
    while most > 1:
        n = <u64>1 << (9 * (most - 1))
        first = gfn & ~(n - 1)
        if (most <= mem_host_level(mmu.mem, slot, frame) and not mmu.no_large[most - 2][frame >> (9 * (most - 1))]
                and first >= mmu.mem.slots[slot].base_gfn
                and first + n <= mmu.mem.slots[slot].base_gfn + mmu.mem.slots[slot].npages
                and (frame ^ gfn) & (n - 1) == 0):
            break
        most -= 1
    return most


cdef bint _can_prefetch(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """There is RAM, which may be mapped without waiting for the host."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    return frame != sc_no_frame() and mem_may_write(mmu.mem, gfn, frame)


cdef inline bint _prefetch(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gpte, bint unlogged) noexcept nogil:
    """Make the leaf of a page of level 1 from the guest's entry, without an access; False if that cannot be."""
    cdef u64 gfn, frame
    cdef u32 rights
    if is_marker(mmu.table[spte]) and marker_stays(mmu, spte, gpte):
        return False
    if not _serves(v, gpte):
        if mmu.table[spte]:
            leaf_drop(mmu, spte)
        return False
    gfn = _gpte_gfn(mmu, spte, gpte)
    frame = mem_frame(mmu.mem, gfn)
    if frame == sc_no_frame():
        return False
    rights = _gpte_rights(mmu, spte, gpte)
    if mmu.table[spte] or mmu.frames[frame].shadowed or mmu.mem.logging or mmu.mem.special or mmu.ring != NULL:
        if not mem_may_write(mmu.mem, gfn, frame):
            return False            # the host is not waited for
        if unlogged and rights & ACC_W and _is_logged(mmu, gfn):
            return False            # it would be logged as written, and nothing has written to it
        leaf_set(mmu, v, spte, gfn, rights, pte_pkey(gpte), FOR_NEIGHBOUR)
    else:                           # what most neighbours are: leaf_set with nothing to look at
        leaf_fill(mmu, spte, frame, leaf_bits(mmu, v, frame, rights, pte_pkey(gpte))
                  | (leaf_writable() if rights & ACC_W else 0))
    mmu.stats.prefetched += 1
    return True


cdef void _prefetch_direct(sc_mmu *mmu, const sc_vcpu *v, u32 first, u32 spte) noexcept nogil:
    """The free entries of the group from `first` on, a stretch of them at a time. A stretch lies in one slot, or all
    ends there; it is filled up to the first frame that cannot be mapped, and if that is its first one all ends, too."""
    cdef u32 at = first
    cdef u32 begin
    cdef u32 rights = role_access(mmu.pages[spte >> 9].role)
    cdef u32 pkey = role_field(mmu.pages[spte >> 9].role, ROLE_PKEY, 15)
    cdef u64 gfn, last
    while at < first + mmu.prefetch:
        if at == spte or mmu.table[at] & PTE_P:
            at += 1
            continue
        begin = at
        while at < first + mmu.prefetch and at != spte and not mmu.table[at] & PTE_P:
            at += 1
        gfn = direct_page_gfn(mmu, begin)
        last = direct_page_gfn(mmu, at - 1)
        if (mem_frame(mmu.mem, gfn) == sc_no_frame() or mem_frame(mmu.mem, last) == sc_no_frame()
                or mem_slot(mmu.mem, gfn) != mem_slot(mmu.mem, last) or (rights & ACC_W and _is_logged(mmu, gfn))
                or not _can_prefetch(mmu, gfn)):
            return
        while begin < at and _can_prefetch(mmu, gfn):
            leaf_set(mmu, v, begin, gfn, rights, pkey, FOR_NEIGHBOUR)
            mmu.stats.prefetched += 1
            begin += 1
            gfn += 1


cdef bint _follow(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u64 gpte, u32 rights, u32 pkey) noexcept nogil:
    """Fill an entry of a page that is never unsync, without an access: with the leaf that a load would get. gpte: the
    guest's leaf, `rights` and `pkey` those of the whole walk."""
    cdef sc_fault f
    if mmu.table[spte] or not _can_prefetch(mmu, gfn):
        return False
    f.access = 0
    f.mode = v.guest.mode
    f.quirks = mmu.quirks
    f.logging = mmu.mem.logging
    f.special = mmu.mem.special
    f.gpa = gfn << 12
    f.frame = mem_frame(mmu.mem, gfn)
    f.gpte = gpte
    f.dirty = gpte & PTE_D
    f.rights = rights
    f.pkey = pkey
    f.refused = f.dirtied = f.unprotected = False
    f.old = 0
    leaf_decide(mmu, v, &f)
    leaf_install(mmu, v, spte, gfn, 0, f.value)
    mmu.stats.prefetched += 1
    return True


cdef bint _follow_gpte(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gpte) noexcept nogil:
    """The same, of the guest's entry behind `spte`, if it serves."""
    cdef u32 role = mmu.pages[spte >> 9].role
    if is_marker(mmu.table[spte]) and marker_stays(mmu, spte, gpte):
        return False
    return _serves(v, gpte) and _follow(mmu, v, spte, _gpte_gfn(mmu, spte, gpte), gpte,
                                        role_access(role) & pte_rights(gpte),
                                        pte_pkey(gpte) if role_pte_size(role) == 8 else 0)


cdef void prefetch_followed(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil:
    """prefetch_around, where no page is unsync. Entries of a direct page have all but the frame in common."""
    cdef u32 first = spte & ~(mmu.prefetch - 1)
    cdef u64 value = mmu.table[spte]
    cdef bint direct = role_direct(mmu.pages[spte >> 9].role)
    cdef const u8 *table = NULL if direct else leaf_gtable(mmu, spte >> 9)
    cdef u32 at
    cdef bint made
    if not value & PTE_P or (table == NULL and not direct):
        return
    for at in range(first, first + mmu.prefetch):
        if at == spte or mmu.table[at] & PTE_P:
            continue
        if direct:
            made = _follow(mmu, v, at, mem_gfn(mmu.mem, mem_leaf_frame(mmu.mem, value)) + at - spte,
                           value & (PTE_A | PTE_D | PTE_G), leaf_guest_rights(value), pte_pkey(value))
        else:
            made = _follow_gpte(mmu, v, at, leaf_gpte(mmu, table, at))
        if not made:
            return


cdef bint _is_made_for(const sc_mmu *mmu, const sc_vcpu *v, u32 page) noexcept nogil:
    """The page's table is read by the rules that v's registers ask for now, so that v can say what serves."""
    cdef u32 role = mmu.pages[page].role
    if not mmu.lists_all:
        return not (role ^ make_role(mmu, v, 0, 1, False, role_access(role))) & ~<u32>(3 << ROLE_QUADRANT)
    if v.guest.mode == MODE_OFF or role_pte_size(role) != (4 if v.guest.mode == MODE_32 else 8):
        return False
    return mmu.quirks & QUIRK_ROLE_WITHOUT_NXE or (
        role_field(role, ROLE_GLEVELS, 15) == <u32>v.guest.mode and role_field(role, ROLE_NXE, 1) == v.guest.nxe)


cdef void entry_update(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil:
    """The emulator stored to the guest's entry behind `spte`, of a page of level 1 in sync: its leaf is made at once,
    if one can be (KVM's update_pte, until c5e2184d1544, 2021)."""
    cdef const u8 *table = leaf_gtable(mmu, spte >> 9)
    if table == NULL or mmu.table[spte] & PTE_P or not _is_made_for(mmu, v, spte >> 9):
        return
    if mmu.lists_all:
        _prefetch(mmu, v, spte, leaf_gpte(mmu, table, spte), True)
    else:
        _follow_gpte(mmu, v, spte, leaf_gpte(mmu, table, spte))


cdef void prefetch_around(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil:
    """After a fault that set a leaf of level 1: its neighbours, upwards, until one cannot be made."""
    cdef u32 first, at
    cdef const u8 *table
    if mmu.prefetch == 0 or role_level(mmu.pages[spte >> 9].role) > 1:
        return
    first = spte & ~(mmu.prefetch - 1)
    if role_direct(mmu.pages[spte >> 9].role):
        _prefetch_direct(mmu, v, first, spte)
        return
    table = leaf_gtable(mmu, spte >> 9)
    if table == NULL:
        return
    for at in range(first, first + mmu.prefetch):
        if at != spte and not mmu.table[at] & PTE_P and not _prefetch(mmu, v, at, leaf_gpte(mmu, table, at), True):
            return


cdef int _entry_sync(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gpte) noexcept nogil:
    """Bring an entry of a page of level 1, which is not 0, in line with the guest's: 1 if that asks for a flush."""
    cdef u64 old = mmu.table[spte]
    cdef u64 gfn = _gpte_gfn(mmu, spte, gpte)
    cdef u32 rights = _gpte_rights(mmu, spte, gpte)
    cdef bint protected
    if is_marker(old):
        marker_stays(mmu, spte, gpte)
        return 0
    if not _serves(v, gpte):
        leaf_drop(mmu, spte)
        return 1
    if not old & PTE_P:
        if (old & pte_addr()) >> 12 == gfn and (
                mmu.quirks & QUIRK_DEVICE_UNASKED or mem_frame(mmu.mem, gfn) == sc_no_frame()):
            _remember_device(mmu, spte, gfn, rights)
        else:
            leaf_drop(mmu, spte)
        return 0
    if mem_gfn(mmu.mem, mem_leaf_frame(mmu.mem, old)) != gfn:
        leaf_drop(mmu, spte)
        return 1
    if not mmu.rewrites and leaf_guest_rights(old) == rights and not (old ^ leaf_key(v, pte_pkey(gpte))) & _keys():
        return 0
    return _replace(mmu, spte, _make(mmu, v, 1, gfn, mem_leaf_frame(mmu.mem, old), rights, pte_pkey(gpte), old,
                                     mem_may_write(mmu.mem, gfn, mem_leaf_frame(mmu.mem, old)), True, False,
                                     &protected))


cdef void leaf_refetch(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil:
    """INVLPG of an entry of an unsync page: it is dropped, and made again at once if the guest's entry serves; or
    (6.12) brought in line if it is there. 2.6.28 makes none."""
    cdef const u8 *table = leaf_gtable(mmu, spte >> 9)
    cdef u64 gpte = leaf_gpte(mmu, table, spte) if table != NULL else 0
    cdef bint flush = False
    if mmu.rewrites or mmu.table[spte]:
        mem_touch(mmu.mem, mmu.pages[spte >> 9].gfn, False)
    if is_marker(mmu.table[spte]) and marker_stays(mmu, spte, gpte):
        return
    if mmu.rewrites:
        flush = mmu.table[spte] & PTE_P
        leaf_drop(mmu, spte)
    elif mmu.table[spte]:
        flush = _entry_sync(mmu, v, spte, gpte)
    if flush:
        request_flush(mmu, FLUSH_LEAF)
    if mmu.rewrites and not mmu.one_role:
        _prefetch(mmu, v, spte, gpte, False)


cdef inline u64 _entries_sync(sc_mmu *mmu, const sc_vcpu *v, u32 page, const u8 *table, bint wide) noexcept nogil:
    """Bring every entry of a leaf table in line with the guest's table at `table`: not 0 if that asks for a flush.
    wide: its entries have 8 bytes; a constant."""
    cdef u64 *sptes = mmu.table + <u64>page * 512
    # What a leaf is made of is the same for the whole table; kept here, for a store to an entry could change any field.
    cdef u32 allowed = role_access(mmu.pages[page].role)
    cdef u64 address = pte_addr() if wide else 0xFFFFF000U
    cdef u64 taken = address | PTE_P | (allowed & (ACC_W | ACC_U)) | leaf_key(v, 15) | (pte_nx() if wide else 0)
    cdef u64 nx = 0 if allowed & ACC_X else pte_nx()
    cdef u64 ram = mem_frame_hpa(mmu.mem, 0)
    cdef u64 low = mmu.mem.low_frames << 12
    cdef u64 serving = PTE_P | PTE_A | v.guest.reserved[0][1] | v.guest.reserved[1][1]
    cdef u64 shown = SPTE_GUEST_W | SPTE_GUEST_U | pte_nx() | _keys()       # what a leaf says of the guest's entry
    cdef bint rewrites = mmu.rewrites
    cdef u64 flush = 0
    cdef u64 bits, gpte, old, value
    cdef u32 word, i
    for word in range(8):
        bits = mmu.pages[page].used[word]
        i = word * 64
        while bits:
            if bits & 1:
                gpte = (<const u64 *>table)[i] if wide else (<const u32 *>table)[i]
                old = sptes[i]
                value = (gpte_granting(gpte) & taken | nx) + ram
                # What most are: _entry_sync with nothing to look up.
                if (gpte & serving == (PTE_P | PTE_A) and gpte & address < low
                        and not (old ^ value) & (pte_addr() | PTE_P | value & PTE_W)):
                    value = leaf_value(value) | (value & PTE_W) * (SPTE_MMU_W // PTE_W)
                    if rewrites or (old ^ value) & shown:
                        flush |= _withdraws(old, value)
                        sptes[i] = value
                else:
                    flush |= <u64>_entry_sync(mmu, v, page * 512 + i, gpte)
            bits >>= 1
            i += 1
    return flush


cdef int page_sync(sc_mmu *mmu, const sc_vcpu *v, u32 page) noexcept nogil:
    """Bring every entry of a leaf table in line: 1 if that asks for a flush, -1 if the guest's table is not there."""
    cdef const u8 *table = leaf_gtable(mmu, page)
    cdef u64 flush
    if table == NULL:
        return -1 if mmu.pages[page].present else 0
    if mmu.pages[page].present:
        mem_touch(mmu.mem, mmu.pages[page].gfn, False)
    if role_pte_size(mmu.pages[page].role) == 8:
        flush = _entries_sync(mmu, v, page, table, True)
    else:
        flush = _entries_sync(mmu, v, page, table, False)
    memo_drop(mmu)
    return flush != 0


cdef void sync_below(sc_mmu *mmu, const sc_vcpu *v, u32 page) noexcept nogil:
    """Bring every unsync page below `page` back in sync: first they are write-protected, then looked at."""
    cdef sc_unsync found
    cdef sc_unsync_at at
    cdef bint flush = False
    cdef bint protected, ignored
    cdef int synced
    cdef u64 frame
    while marks_walk(mmu, page, &found):
        protected = False
        marks_first(mmu, &found, &at)
        while marks_next(mmu, &found, &at):
            frame = mem_frame(mmu.mem, mmu.pages[at.page].gfn)
            if frame != sc_no_frame():
                protected |= rmap_write_protect(mmu, frame)
        if protected:
            zap_commit(mmu, True)
            flush = False
        marks_first(mmu, &found, &at)
        while marks_next(mmu, &found, &at):
            page_left_sync(mmu, at.page)
            mmu.stats.synced += 1
            synced = page_sync(mmu, v, at.page)
            if synced < 0:
                zap_prepare(mmu, at.page, &ignored)
            elif mmu.absent:
                page_mark(mmu, at.page)
            flush |= synced > 0
            marks_clear(mmu, &at)
    zap_commit(mmu, flush)
