"""Exits of nested paging (EPT violations and misconfigurations, #NPF), in the order in which Linux 6.1 goes about them.

An exit has a gpa: of an entry of a guest's table, or where the access leads. What is missing there is mapped; a frame
that the log of its slot has to see gets W back; a device is handed out. What no entry can grant, the emulator does: a
store to a read-only slot, and a guest's table where the processor may not write.
"""
from shadowcore.engine.bits cimport PTE_P, PTE_PS, PTE_W, SPTE_MMU_W, level_index, pte_addr
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_GUEST, EXIT_MMIO, EXIT_WRITE
from shadowcore.engine.flushes cimport FLUSH_LINK, request_flush
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.invalidate cimport inject_fault
from shadowcore.engine.memory cimport (
    mem_frame, mem_is_device, mem_is_rom, mem_mark_dirty, mem_pool_page, mem_slot, mem_touch, sc_no_frame,
)
from shadowcore.engine.nested.roots cimport child_get, enter, zap_tables
from shadowcore.engine.nested.tables cimport leaf_split, table_gfn, table_link, tree_set
from shadowcore.engine.record cimport (
    FAST_PF_FIXED, FAST_PF_NONE, FAST_PF_SPURIOUS, RECORD_DEVICE_CHECKED, RECORD_DEVICE_HIT, RECORD_EMULATED,
    RECORD_EXIT, RECORD_FAST, record,
)
from shadowcore.engine.role cimport role_level
from shadowcore.engine.spte cimport spte_link
from shadowcore.engine.state cimport memo_drop, sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport (
    FOR_LOAD, FOR_STORE, LEAF_DEVICE, LEAF_SAME, device_is_stale, device_rights, leaf_level, leaf_set, prefetch_around,
)
from shadowcore.engine.types cimport (
    ACC_ALL, PF_P, PF_RSVD, PF_W, RC_EXHAUSTED, RC_MMIO, RC_OK, RC_PF, RC_RETRY, SC_NONE,
    npf_table, u32, u64,
)
from shadowcore.engine.unsync.roots cimport make_room
from shadowcore.engine.walker cimport guest_walk, sc_walk
from shadowcore.engine.zap cimport leaf_drop, zap_oldest


cdef u32 _last_entry(const sc_mmu *mmu, const sc_vcpu *v, u64 gpa) noexcept nogil:
    """The last entry of the host's tables on the way to gpa, or SC_NONE."""
    cdef u32 page = v.roots[0]
    cdef int level = mmu.host_levels
    cdef u32 spte
    if gpa >> (12 + 9 * level):
        return SC_NONE
    while True:
        spte = page * 512 + level_index(gpa, level)
        if level == 1 or not mmu.table[spte] & PTE_P or mmu.table[spte] & PTE_PS:
            return spte
        page = mem_pool_page(mmu.table[spte])
        level -= 1


cdef int _emulate(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """The instruction is given to the emulator, which walks the guest's tables itself where the processor could not."""
    mmu.stats.insn_emulation += 1
    record(mmu, RECORD_EMULATED, va, 0, 0)
    if w.refused_code & npf_table():
        if guest_walk(mmu.mem, &v.guest, va, access, w) != RC_OK:
            mmu.stats.guest_walk_references += w.references
            inject_fault(mmu, v, va, w.error_code)
            count_exit(mmu, v.number, EXIT_GUEST, va)
            enter(mmu, v)
            return RC_PF
        mmu.stats.guest_walk_references += w.references
        if not mem_is_device(mmu.mem, w.gpa >> 12, access):
            mem_touch(mmu.mem, w.gpa >> 12, access & PF_W != 0)
            count_exit(mmu, v.number, EXIT_EMULATE, va)
            enter(mmu, v)
            return RC_OK
    count_exit(mmu, v.number, EXIT_MMIO, va)
    mmu.stats.pf_mmio += 1
    enter(mmu, v)
    return RC_MMIO


cdef int _device(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u64 value, sc_walk *w) noexcept nogil:
    """An exit at an entry that remembers a device."""
    cdef u64 gfn = (value & pte_addr()) >> 12
    mmu.stats.pf_mmio_spte_hit += 1
    if not gfn or v.device_gfn != gfn or v.device_generation != mmu.generation:
        record(mmu, RECORD_DEVICE_CHECKED, 0, 0, 1)
        record(mmu, RECORD_DEVICE_HIT, gfn, device_rights(value), 0)
        v.device_gfn = gfn
        v.device_generation = mmu.generation
    return _emulate(mmu, v, va, access, w)


cdef bint _is_logged(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    return mmu.mem.logging and mmu.mem.slots[mem_slot(mmu.mem, gfn)].dirty != NULL


cdef int _fast(sc_mmu *mmu, u32 spte, u64 gfn) noexcept nogil:
    """A store to a page that is mapped: FAST_PF_*. W comes back where only a dirty log took it, but to no large leaf
    of a slot that is logged."""
    cdef u64 value = mmu.table[spte]
    cdef int level = role_level(mmu.pages[spte >> 9].role)
    if not value & PTE_P or (level > 1 and not value & PTE_PS):
        return FAST_PF_NONE
    if value & PTE_W:
        return FAST_PF_SPURIOUS
    if not value & SPTE_MMU_W or (level > 1 and _is_logged(mmu, gfn)):
        return FAST_PF_NONE
    mmu.table[spte] = value | PTE_W
    memo_drop(mmu)
    mem_mark_dirty(mmu.mem, gfn)
    return FAST_PF_FIXED


cdef bint _step_down(sc_mmu *mmu, sc_vcpu *v, u32 spte, u64 gfn, int level) noexcept nogil:
    """The entry, of `level`, is to lead to a table: False if no page is free."""
    cdef u64 value = mmu.table[spte]
    cdef u32 child
    if value & PTE_P and not value & PTE_PS:
        return True
    if mmu.tdp and value & PTE_P:
        return leaf_split(mmu, spte)
    child = child_get(mmu, v, table_gfn(gfn, level - 1), level - 1)
    if child == SC_NONE:
        return False
    if mmu.tdp:
        table_link(mmu, spte, child)
        return True
    if value & PTE_P:
        leaf_drop(mmu, spte)
        request_flush(mmu, FLUSH_LINK)
    spte_link(mmu, spte, child)
    return True


cdef int _map(sc_mmu *mmu, sc_vcpu *v, u64 gfn, bint write) noexcept nogil:
    """Map gfn: LEAF_*, or RC_EXHAUSTED."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef int goal = leaf_level(mmu, gfn, frame, mmu.largest)
    cdef int level = mmu.host_levels
    cdef u64 first = gfn & ~((<u64>1 << 9 * (goal - 1)) - 1)
    cdef u32 page = v.roots[0]
    cdef u32 spte
    cdef int made
    while True:
        spte = page * 512 + level_index(gfn << 12, level)
        if level == goal:
            break
        if not _step_down(mmu, v, spte, gfn, level):
            return RC_EXHAUSTED
        page = mem_pool_page(mmu.table[spte])
        level -= 1
    if mmu.tdp:
        return tree_set(mmu, v, spte, first, FOR_STORE if write else FOR_LOAD)
    made = leaf_set(mmu, v, spte, first, ACC_ALL, 0, FOR_STORE if write else FOR_LOAD)
    if made != LEAF_SAME and made != LEAF_DEVICE:
        prefetch_around(mmu, v, spte)
    return made


cdef int _map_with_room(sc_mmu *mmu, sc_vcpu *v, u64 gfn, bint write) noexcept nogil:
    """_map, and once more with all the room there can be."""
    cdef int made = RC_EXHAUSTED
    cdef u32 before = mmu.n_active
    if not v.loaded:
        return RC_EXHAUSTED
    if mmu.tdp or make_room(mmu, 1):
        made = _map(mmu, v, gfn, write)
    if made == RC_EXHAUSTED:
        if mmu.tdp:
            before = mmu.n_active
            zap_tables(mmu)
            mmu.stats.mmu_recycled += before - mmu.n_active
        else:
            zap_oldest(mmu, mmu.n_active)
        made = _map(mmu, v, gfn, write)
    return made


cdef int host_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """sc_design.host_fault."""
    cdef u64 gfn = w.refused_gpa >> 12
    cdef bint write = w.refused_code & PF_W != 0
    cdef bint present = w.refused_code & PF_P != 0
    cdef u64 old = 0
    cdef u64 changes = 0
    cdef u32 spte
    cdef int made
    if not v.loaded:
        mmu.exhausted = v.number
        return RC_EXHAUSTED
    spte = _last_entry(mmu, v, w.refused_gpa)
    if spte != SC_NONE:
        old = mmu.table[spte]
    record(mmu, RECORD_EXIT, w.refused_gpa, w.refused_code | (PF_RSVD if old and not old & PTE_P else 0), 0)
    if old and not old & PTE_P:
        if not device_is_stale(mmu, old):
            mmu.stats.npf_misconfig += 1
            return _device(mmu, v, va, access, old, w)
        record(mmu, RECORD_DEVICE_CHECKED, 0, 0, 0)
    mmu.stats.pf_taken += 1
    mmu.stats.npf_violation += 1
    if present and write:
        made = _fast(mmu, spte, gfn)
        record(mmu, RECORD_FAST, w.refused_gpa, w.refused_code, made)
        if made != FAST_PF_NONE:
            mmu.stats.pf_fast += 1
            if made == FAST_PF_FIXED:
                mmu.stats.pf_fixed += 1
            else:
                mmu.stats.pf_spurious += 1
            count_exit(mmu, v.number, EXIT_WRITE, va)
            enter(mmu, v)
            return RC_RETRY
    if spte == SC_NONE or (write and mem_is_rom(mmu.mem, gfn)):
        mmu.stats.pf_emulate += 1   # no entry can say so
        return _emulate(mmu, v, va, access, w)
    if mmu.mem.host != NULL:
        changes = mmu.mem.host.changes
        mem_touch(mmu.mem, gfn, write)
        changes = mmu.mem.host.changes - changes
    if mem_frame(mmu.mem, gfn) == sc_no_frame():
        v.device_gfn = gfn
        v.device_generation = mmu.generation
    if changes:
        # What the host said of the page holds no more: it is asked again at the next exit.
        count_exit(mmu, v.number, EXIT_WRITE if present else EXIT_FILL, va)
        enter(mmu, v)
        return RC_RETRY
    made = _map_with_room(mmu, v, gfn, write)
    if made == RC_EXHAUSTED:
        mmu.exhausted = v.number
        mmu.stats.pf_taken -= 1     # it comes to nothing, and is no exit
        mmu.stats.npf_violation -= 1
        return RC_EXHAUSTED
    if made == LEAF_DEVICE:
        mmu.stats.pf_emulate += 1
        return _emulate(mmu, v, va, access, w)
    if made == LEAF_SAME:
        mmu.stats.pf_spurious += 1
    else:
        mmu.stats.pf_fixed += 1
    count_exit(mmu, v.number, EXIT_WRITE if present else EXIT_FILL, va)
    enter(mmu, v)
    return RC_RETRY
