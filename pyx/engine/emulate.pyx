"""Stores to guest tables: what shadows the changed entry is dropped, then the bytes change (patches 12, 13, 20, 24).

A cleared entry is rebuilt by the fault that next needs it.
"""
from libc.string cimport memcpy

from shadowcore.engine.absent cimport MARK_PAGE, entry_mark
from shadowcore.engine.bits cimport PTE_P
from shadowcore.engine.floods cimport page_floods
from shadowcore.engine.flushes cimport FLUSH_STORE, entry_flush
from shadowcore.engine.hooks cimport POINT_POST_WRITE, POINT_PRE_WRITE, audit_point
from shadowcore.engine.memory cimport mem_frame, mem_mark_dirty, mem_touch, sc_no_frame
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.pool cimport hash_bucket, pool_zap, shadows
from shadowcore.engine.quirks cimport QUIRK_PDE_WRITE
from shadowcore.engine.role cimport ROLE_QUADRANT, role_direct, role_field, role_level, role_pte_size
from shadowcore.engine.spte cimport spte_unlink, spte_wipe
from shadowcore.engine.state cimport is_shadowed, sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport entry_update
from shadowcore.engine.types cimport MODE_32, SC_NONE, u8, u32, u64
from shadowcore.engine.walker cimport sc_walk, walk_index
from shadowcore.engine.zap cimport entry_zap


# Is a store part of a flood?
cdef enum:
    SINGLE = 0
    FLOOD = 1
    ASK_PAGE = 2                    # the page that shadows the table has a count of its own


cdef inline void _drop_entry(sc_mmu *mmu, u32 number, u32 index) noexcept nogil:
    cdef u32 spte = number * 512 + index
    cdef u64 value = mmu.table[spte]
    cdef int level
    if value == 0:
        return
    level = role_level(mmu.pages[number].role)
    if level > 1:
        mmu.stats.mmu_pde_zapped += 1
    if value & PTE_P:
        entry_flush(mmu, FLUSH_STORE)
    spte_unlink(mmu, spte, level)
    spte_wipe(mmu, spte)


cdef inline void _drop_gpte(sc_mmu *mmu, u32 number, u32 offset) noexcept nogil:
    """Drop what the page holds for the guest entry at byte `offset` of its table."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u32 entry
    if role_pte_size(page.role) == 8:
        _drop_entry(mmu, number, offset >> 3)
    elif mmu.quirks & QUIRK_PDE_WRITE:
        _drop_entry(mmu, number, ((offset * 2) & 4095) >> 3)
    elif role_level(page.role) == 1:
        # 1024 entries of 4 KiB: entry n is index n mod 512 of quadrant n / 512.
        entry = offset >> 2
        if entry >> 9 == role_field(page.role, ROLE_QUADRANT, 3):
            _drop_entry(mmu, number, entry & 511)
    else:
        # 1024 entries of 4 MiB: entry n is indices 2n and 2n + 1, modulo 512, of quadrant n / 256.
        entry = offset >> 2
        if entry >> 8 == role_field(page.role, ROLE_QUADRANT, 3):
            _drop_entry(mmu, number, (entry * 2) & 511)
            _drop_entry(mmu, number, (entry * 2 + 1) & 511)


cdef inline void _drop_written(sc_mmu *mmu, u64 gpa, u64 frame, u32 nbytes, u32 flooded) noexcept nogil:
    """table_written, in a known frame of RAM. flooded: SINGLE, FLOOD, ASK_PAGE."""
    cdef u64 gfn = gpa >> 12
    cdef u32 offset = gpa & 4095
    cdef u32 number, following, misaligned
    cdef const sc_page *page
    if not is_shadowed(mmu, frame):
        return
    mmu.stats.mmu_pte_write += 1
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        page = &mmu.pages[number]
        following = page.hash_next
        if page.gfn == gfn and not role_direct(page.role):
            misaligned = (offset ^ (offset + nbytes - 1)) & ~<u32>(role_pte_size(page.role) - 1)
            if misaligned or (flooded and (flooded == FLOOD or page_floods(mmu, &mmu.pages[number]))):
                mmu.stats.mmu_flooded += 1
                pool_zap(mmu, number)
            else:
                _drop_gpte(mmu, number, offset)
        number = following


cdef void table_written(sc_mmu *mmu, u64 gpa, u32 nbytes, bint flooded) noexcept nogil:
    """The `nbytes` at `gpa`, within one frame, are about to change: drop every spte made from them.

    A store that does not lie within one entry, or belongs to a flood, zaps the page.
    """
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    if frame != sc_no_frame():
        _drop_written(mmu, gpa, frame, nbytes, flooded)


cdef void _look_again(sc_mmu *mmu, const sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil:
    """The bytes at gpa have changed, by a store of v, or of a device (NULL): leaves are made of entries there that
    serve, and what shadows an entry that is not present is marked, as far as settings ask for it."""
    cdef u64 gfn = gpa >> 12
    cdef u32 number, size, entry
    if not is_shadowed(mmu, mem_frame(mmu.mem, gfn)):
        return
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if shadows(mmu, number, gfn) and role_level(mmu.pages[number].role) == 1 and not mmu.pages[number].unsync:
            size = role_pte_size(mmu.pages[number].role)
            for entry in range((gpa & 4095) // size, ((gpa & 4095) + nbytes - 1) // size + 1):
                if size == 4 and entry >> 9 != role_field(mmu.pages[number].role, ROLE_QUADRANT, 3):
                    continue
                if mmu.in_place and v != NULL:
                    entry_update(mmu, v, number * 512 + (entry & 511))
                if mmu.absent == MARK_PAGE:
                    entry_mark(mmu, number * 512 + (entry & 511))
        number = mmu.pages[number].hash_next


cdef inline void _store(sc_mmu *mmu, u64 gpa, const u8 *data, u32 nbytes, bint flooded) noexcept nogil:
    """A store to RAM, within one frame, that the shadow hears of."""
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    mem_touch(mmu.mem, gpa >> 12, True)
    audit_point(mmu, POINT_PRE_WRITE)
    _drop_written(mmu, gpa, frame, nbytes, flooded)
    memcpy(mmu.mem.ram + (frame << 12) + (gpa & 4095), data, nbytes)
    mem_mark_dirty(mmu.mem, gpa >> 12)
    audit_point(mmu, POINT_POST_WRITE)


cdef void _store_marked(sc_mmu *mmu, u64 gpa, const u8 *data, u32 nbytes, bint flooded) noexcept nogil:
    """The same, where entries that are not present afterwards are marked."""
    _store(mmu, gpa, data, nbytes, flooded)
    if mmu.absent == MARK_PAGE:
        _look_again(mmu, NULL, gpa, nbytes)


cdef void _store_first(sc_mmu *mmu, sc_vcpu *v, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil:
    """The same, where the design looks at what is there afterwards. v: NULL, if no vcpu made it."""
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    mem_touch(mmu.mem, gpa >> 12, True)
    audit_point(mmu, POINT_PRE_WRITE)
    memcpy(mmu.mem.ram + (frame << 12) + (gpa & 4095), data, nbytes)
    mem_mark_dirty(mmu.mem, gpa >> 12)
    mmu.design.stored(mmu, v, gpa, nbytes)
    if mmu.in_place or mmu.absent == MARK_PAGE:
        _look_again(mmu, v, gpa, nbytes)
    audit_point(mmu, POINT_POST_WRITE)


cdef inline bint _counted(sc_mmu *mmu, sc_vcpu *v, u64 gfn) noexcept nogil:
    """One more store of v. True: with those before it, to the same frame, it is a flood."""
    if gfn == v.flood_gfn:
        v.flood_count += 1
    else:
        v.flood_gfn = gfn
        v.flood_count = 1
    return mmu.flood_threshold != 0 and v.flood_count >= mmu.flood_threshold


cdef void store_followed(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil:
    """sc_design.stored of designs in which no page is unsync: for settings that look at what is there afterwards, or
    count floods page by page."""
    cdef u32 flooded = SINGLE
    if v != NULL:
        mmu.stats.pf_emulate += 1
        mmu.store_clock += 1
        flooded = ASK_PAGE if mmu.flood_pages else FLOOD if _counted(mmu, v, gpa >> 12) else SINGLE
    _drop_written(mmu, gpa, mem_frame(mmu.mem, gpa >> 12), nbytes, flooded)


cdef void emulate_store(sc_mmu *mmu, sc_vcpu *v, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil:
    """The guest's store of `nbytes`, within one frame of RAM, done by the emulator; counts towards a write flood."""
    cdef bint flooded
    if mmu.design.stored != NULL:   # it counts floods itself
        _store_first(mmu, v, gpa, data, nbytes)
        return
    flooded = _counted(mmu, v, gpa >> 12)
    mmu.stats.pf_emulate += 1
    if mmu.absent:
        _store_marked(mmu, gpa, data, nbytes, flooded)
    else:
        _store(mmu, gpa, data, nbytes, flooded)


cdef void device_store(sc_mmu *mmu, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil:
    """A store that no vcpu made, to RAM, within one frame: the shadow stays coherent, nothing is counted as a flood."""
    if mmu.design.stored != NULL:
        _store_first(mmu, NULL, gpa, data, nbytes)
        return
    _store_marked(mmu, gpa, data, nbytes, False)


cdef void walk_updated(sc_mmu *mmu, const sc_vcpu *v, const sc_walk *w) noexcept nogil:
    """The walk set A or D bits: bits 5 and 6 of an entry, in both formats. In shadows of the same frame they only ever
    add what a later fault would find, with one exception: every second entry of a table of 4 bytes is the upper half of
    one of 8 bytes, in which they are bits 37 and 38 of the address. What was made of that one is dropped.
    """
    cdef int level
    cdef u32 number, following, index
    cdef u64 frame
    if v.guest.mode != MODE_32 or not mmu.n_pte8:
        return
    for level in range(1, w.top + 1):
        index = walk_index(w, level)
        if not (w.updated >> level & 1 and index & 1):
            continue
        frame = mem_frame(mmu.mem, w.table[level])
        if frame == sc_no_frame() or mmu.frames[frame].shadowed == 0:
            continue
        number = mmu.hash[hash_bucket(mmu, w.table[level])]
        while number != SC_NONE:
            following = mmu.pages[number].hash_next
            if (mmu.pages[number].gfn == w.table[level] and not role_direct(mmu.pages[number].role)
                    and role_pte_size(mmu.pages[number].role) == 8):
                if not mmu.lists_all:
                    _drop_entry(mmu, number, index >> 1)
                elif mmu.table[number * 512 + (index >> 1)]:
                    # There may be large leaves, and all of them are counted.
                    entry_flush(mmu, FLUSH_STORE)
                    entry_zap(mmu, number * 512 + (index >> 1))
            number = following
