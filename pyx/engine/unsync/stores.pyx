"""Emulated stores to guest tables under design unsync."""
from libc.string cimport memcpy

from shadowcore.engine.bits cimport CR4_PAE, PTE_P
from shadowcore.engine.floods cimport page_floods
from shadowcore.engine.memory cimport mem_frame, mem_guest_frame
from shadowcore.engine.pool cimport hash_bucket, shadows
from shadowcore.engine.quirks cimport QUIRK_STORE_ROUNDED
from shadowcore.engine.role cimport ROLE_QUADRANT, role_field, role_level, role_pte_size
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport SC_NONE, u32, u64
from shadowcore.engine.unsync.roots cimport enter
from shadowcore.engine.zap cimport entry_zap, zap_commit, zap_gfn, zap_prepare


cdef inline void other_instruction(const sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """Something else is emulated than the store that was run again natively; 6.12 remembers that one all the same."""
    if mmu.rewrites:
        v.retried = False


cdef bint run_again(sc_mmu *mmu, sc_vcpu *v, u64 va, u64 gpa) noexcept nogil:
    """The second time at one place it is emulated after all: the instruction may need the table that it stores to."""
    cdef u64 freed = mmu.stats.page_frees
    if v.retried and v.retried_va == va and v.retried_rip == v.rip:
        other_instruction(mmu, v)
        return False
    v.retried = False
    zap_gfn(mmu, gpa >> 12)
    if mmu.stats.page_frees == freed and not mmu.rewrites:
        return False                # only roots in use shadow the table: it is write-protected still
    v.retried = True
    v.retried_va = va
    v.retried_rip = v.rip
    enter(mmu, v)
    return True


cdef inline bint _misaligned(u32 offset, u32 nbytes, u32 size) noexcept nogil:
    """The store does not lie within one entry, or is shorter than one of 4 bytes. One byte at the start of an entry is
    how Linux clears a bit."""
    if nbytes == 1 and not offset & (size - 1):
        return False
    return (offset ^ (offset + nbytes - 1)) & ~(size - 1) or nbytes < 4


cdef bint _drop_written(sc_mmu *mmu, u32 number, u32 offset, bint counts) noexcept nogil:
    """Zap what the page holds for the guest's entry at byte `offset` of its table; True if something was present."""
    cdef int level = role_level(mmu.pages[number].role)
    cdef u32 n = 1
    cdef u32 i
    cdef bint flush = False
    if role_pte_size(mmu.pages[number].role) == 4:
        offset *= 2                 # entries of the shadow have 8 bytes
        if level == 2:
            offset = (offset & ~<u32>7) * 2        # two of them stand for one of the guest's
            n = 2
        if offset >> 12 != role_field(mmu.pages[number].role, ROLE_QUADRANT, 3):
            return False
        offset &= 4095
    for i in range(number * 512 + offset // 8, number * 512 + offset // 8 + n):
        flush |= mmu.table[i] & PTE_P
        entry_zap(mmu, i)
        if counts and level > 1:
            mmu.stats.mmu_pde_zapped += 1
    return flush


cdef inline bint _floods(const sc_mmu *mmu, u32 number, const sc_vcpu *v) noexcept nogil:
    """So many stores to a table above the leaves since it was last used are a flood."""
    return role_level(mmu.pages[number].role) > 1 and v != NULL and page_floods(mmu, &mmu.pages[number])


cdef void stored(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil:
    """The emulator, or a device, stored `nbytes` at gpa."""
    cdef u64 gfn = gpa >> 12
    cdef u32 offset = gpa & 4095
    cdef u64 entry = 0
    cdef u32 number
    cdef bint flush = False
    cdef bint ignored = False
    if v != NULL:
        other_instruction(mmu, v)
        mmu.store_clock += 1
    elif mmu.frames[mem_frame(mmu.mem, gfn)].shadowed == 0:
        return
    if mmu.n_pte4 + mmu.n_pte8 == 0:
        return
    if v != NULL and v.cr4 & CR4_PAE and nbytes == 4 and (offset & 7 <= 4 or mmu.quirks & QUIRK_STORE_ROUNDED):
        offset &= ~<u32>7           # half of an entry: what counts is the whole
        nbytes = 8
    if (nbytes == 8 or nbytes == 4) and offset + nbytes <= 4096:
        memcpy(&entry, mem_guest_frame(mmu.mem, gpa) + offset, nbytes)      # it need not be aligned
    mmu.stats.mmu_pte_write += 1
    number = mmu.hash[hash_bucket(mmu, gfn)]
    while number != SC_NONE:
        if shadows(mmu, number, gfn):
            if _misaligned(offset, nbytes, role_pte_size(mmu.pages[number].role)) or _floods(mmu, number, v):
                zap_prepare(mmu, number, &ignored)
                mmu.stats.mmu_flooded += 1
            else:
                flush |= _drop_written(mmu, number, offset, entry != 0)
        number = mmu.pages[number].hash_next
    zap_commit(mmu, flush)
