"""The host's tables, which translate what is below marks: direct pages of the pool, found, recycled, zapped as others,
with leaves of 4 KiB that are in the reverse map as shadow leaves are. So a frame that gets a shadow loses W there too.

They are filled by exits (EPT violations), a page each. The root is no root of a vcpu: if it is recycled, an exit makes
it again and finds the tables below it.
"""
from shadowcore.engine.agile.rule cimport table_stored, table_to_shadow
from shadowcore.engine.bits cimport PTE_A, PTE_D, PTE_P, level_index
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_MMIO, EXIT_WRITE
from shadowcore.engine.emulate cimport walk_updated
from shadowcore.engine.flushes cimport exit_flush
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.leaf cimport leaf_install, leaf_replace
from shadowcore.engine.memory cimport (
    SC_POOL_HFN, mem_frame, mem_frame_hpa, mem_is_rom, mem_mark_dirty, mem_may_write, mem_pool_hpa, mem_pool_page,
    mem_touch, mem_unlogged, sc_no_frame,
)
from shadowcore.engine.pool cimport pool_find, pool_get, pool_has, pool_recycle
from shadowcore.engine.role cimport role_of_host
from shadowcore.engine.roots cimport release_everything
from shadowcore.engine.spte cimport leaf_spte, spte_is_writable, spte_link
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_W, PF_P, PF_U, PF_W, RC_EMULATE, RC_MMIO, RC_RETRY, SC_NONE, npf_table, u32, u64,
)
from shadowcore.engine.walker cimport guest_walk, sc_walk


cdef void host_tables_in_place(const sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """The processor walks the host's tables from their root, if they have one."""
    cdef u32 root = pool_find(mmu, 0, role_of_host(mmu.host_levels))
    v.guest.host_top = mmu.host_levels
    v.guest.host_root = 0 if root == SC_NONE else mem_pool_hpa(root)


cdef bint _map(sc_mmu *mmu, sc_vcpu *v, u64 va, u64 gfn, bint write) noexcept nogil:
    """Map the frame of gfn, which is RAM, for a store or not; False if there are not the pages for it, and nothing that
    could be zapped is left."""
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef u32 granted = ACC_ALL
    cdef u32 page, spte, child
    cdef u64 old, value
    cdef int level
    if mmu.n_free < mmu.min_free:
        pool_recycle(mmu, mmu.refill)
    if mmu.n_free < mmu.host_levels:
        pool_recycle(mmu, mmu.host_levels)
    if not pool_has(mmu, mmu.host_levels):
        release_everything(mmu, v, va)
        return False
    page = pool_get(mmu, 0, role_of_host(mmu.host_levels))
    for level in range(<int>mmu.host_levels, 1, -1):
        if page == SC_NONE:
            return False
        spte = page * 512 + level_index(gfn << 12, level)
        if mmu.table[spte] == 0:
            child = pool_get(mmu, gfn & ~((<u64>1 << 9 * (level - 1)) - 1), role_of_host(level - 1))
            if child == SC_NONE:
                return False
            spte_link(mmu, spte, child)
        page = mem_pool_page(mmu.table[spte])
    spte = page * 512 + level_index(gfn << 12, 1)
    old = mmu.table[spte]
    if (mmu.frames[frame].shadowed or (mmu.mem.logging and not write and mem_unlogged(mmu.mem, gfn))
            or (mmu.mem.special and not mem_may_write(mmu.mem, gfn, frame))):
        granted &= ~<u32>ACC_W          # the store, when it comes, is to be seen
    value = leaf_spte(mem_frame_hpa(mmu.mem, frame), 0, granted, 0) | old & (PTE_A | PTE_D)
    if old & PTE_P:
        leaf_replace(mmu, v, spte, gfn, old, value)
    else:
        leaf_install(mmu, v, spte, gfn, old, value)
    if mmu.mem.logging and spte_is_writable(value):
        mem_mark_dirty(mmu.mem, gfn)
    return True


cdef inline bint _on_the_way(const sc_mmu *mmu, const sc_walk *hw, u64 gfn) noexcept nogil:
    """The guest table at gfn is one of those above the mark: it is shadowed again before the access can be made."""
    cdef int level
    for level in range(hw.level + 1, hw.top + 1):
        if mmu.pages[hw.table[level] - SC_POOL_HFN].gfn == gfn:
            return True
    return False


cdef int host_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """An exit: the host's tables refused w.refused_gpa: an entry of a guest's table, or where the complete walk w leads
    below the mark at which hw ended. As fault.page_fault: RC_RETRY, RC_EMULATE, RC_MMIO."""
    cdef u64 gfn = w.refused_gpa >> 12
    cdef u64 table = mmu.pages[hw.table[hw.level] - SC_POOL_HFN].gfn
    cdef u64 frame = mem_frame(mmu.mem, gfn)
    cdef bint write = w.refused_code & PF_W != 0
    cdef int kind = EXIT_WRITE if w.refused_code & PF_P else EXIT_FILL
    cdef int rc = RC_RETRY
    cdef bint final = not w.refused_code & npf_table()
    exit_flush(mmu)
    mmu.stats.pf_taken += 1
    mmu.stats.npf_violation += 1
    if frame == sc_no_frame() or (write and mem_is_rom(mmu.mem, gfn)):
        mmu.stats.pf_mmio += 1
        count_exit(mmu, v.number, EXIT_MMIO, va)
        return RC_MMIO
    mem_touch(mmu.mem, gfn, write)
    if write and mmu.frames[frame].shadowed:
        if not final:
            table_stored(mmu, gfn)
        elif access & PF_U and not _on_the_way(mmu, hw, gfn):
            mmu.design.unprotect(mmu, gfn)      # user mode does not edit page tables (patch 27)
    if write and mmu.frames[frame].shadowed:
        if final:
            rc = RC_EMULATE
            kind = EXIT_EMULATE
        else:
            # The processor was about to set A or D in a table that has a shadow. It is done for it.
            guest_walk(mmu.mem, &v.guest, va, access, w)
            mmu.stats.guest_walk_references += w.references
            walk_updated(mmu, v, w)
    elif gfn >> 9 * mmu.host_levels or not _map(mmu, v, va, gfn, write):
        table_to_shadow(mmu, table)     # there is no room for it, or no address: then by the shadow
    mmu.stats.pf_fixed += 1
    if mmu.flood_reset and kind != EXIT_EMULATE:
        v.flood_count = 0
    count_exit(mmu, v.number, kind, va)
    return rc
