"""Design `cached`: shadow pages belong to guest tables, which are write-protected.

Loads of CR3 only change roots; INVLPG and page faults of the guest find nothing stale (patch 18).
"""
from shadowcore.engine.bits cimport PTE_P, pte_addr
from shadowcore.engine.counters cimport EXIT_CR0, EXIT_CR3, EXIT_CR4, EXIT_EFER
from shadowcore.engine.fast cimport fault_fast
from shadowcore.engine.flushes cimport exit_flush
from shadowcore.engine.leaf cimport direct_gfn, direct_role
from shadowcore.engine.memory cimport SC_POOL_HFN
from shadowcore.engine.pool cimport pool_design, pool_get, pool_has, pool_recycle
from shadowcore.engine.quirks cimport QUIRK_ABSENT_PDPTES, QUIRK_NO_REFILL_AT_CR3, QUIRK_ROLE_WITHOUT_ACCESS
from shadowcore.engine.role cimport role_direct
from shadowcore.engine.roots cimport (
    make_role, release_everything, root_load, root_release, root_slots, roots_load, roots_release,
    slot_changed, slot_changes,
)
from shadowcore.engine.state cimport sc_loaded, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport MODE_64, MODE_OFF, MODE_PAE, SC_NONE, u32, u64
from shadowcore.engine.walker cimport sc_paging, sc_walk, walk_above


cdef inline void _other_roots(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    roots_release(mmu, v)
    if mmu.n_free < mmu.min_free and not mmu.quirks & QUIRK_NO_REFILL_AT_CR3:
        pool_recycle(mmu, mmu.refill)
    roots_load(mmu, v)


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    if v.guest.mode == MODE_OFF:
        return
    mmu.stats.tlb_flush += 1        # the flush itself is the CR3 load's: see registers
    exit_flush(mmu)
    _other_roots(mmu, v)


cdef void _reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    """Pages of the old mode stay: roles tell them apart."""
    exit_flush(mmu)
    _other_roots(mmu, v)


cdef bint _wanted(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil:
    """A PAE root entry that is not present stands for nothing."""
    return v.guest.mode != MODE_PAE or v.guest.pdpte[slot] & PTE_P or mmu.quirks & QUIRK_ABSENT_PDPTES


cdef bint _root_of(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil:
    """The guest's root table, in PAE format a directory; with paging off there is none."""
    cdef const sc_paging *g = &v.guest
    direct[0] = g.mode == MODE_OFF
    gfn[0] = 0 if g.mode == MODE_OFF else g.root >> 12
    if g.mode == MODE_PAE:
        gfn[0] = (g.pdpte[slot] & pte_addr()) >> 12
        return _wanted(mmu, v, slot)
    return True


cdef bint _make_room(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """As many free pages as the fault can need (patches 17, 29). False: they are not to be had."""
    cdef int slot = 0 if root_slots(v) == 1 else <int>(va >> 30) & 3
    cdef u32 need = (v.guest.mode if v.guest.mode >= MODE_64 else 2) - 1
    cdef bint loaded = False
    if mmu.n_free < mmu.min_free:
        pool_recycle(mmu, mmu.refill)
    if v.roots[slot] == SC_NONE and _wanted(mmu, v, slot):
        if not pool_has(mmu, need + 1):
            release_everything(mmu, v, va)
        loaded = root_load(mmu, v, slot) != SC_NONE     # takes no page where another vcpu has the same root
        need += v.roots[slot] == SC_NONE
    if mmu.n_free < need:
        pool_recycle(mmu, need)
    if pool_has(mmu, need):
        return True
    release_everything(mmu, v, va)
    if pool_has(mmu, need):
        return True
    if loaded:
        root_release(mmu, v, slot)  # it serves nothing without the tables below, and others may want the page
    return False


cdef u32 _child(sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, const sc_walk *w, u32 linked) noexcept nogil:
    """The page of the guest's table; below that, of the part of the large page. That one is right, if it is linked, if
    the large gpte grants what it did."""
    cdef u64 gfn
    cdef u32 role
    if level >= w.level:
        return pool_get(mmu, w.table[level], make_role(mmu, v, va, level, False, walk_above(w, level)))
    if linked != SC_NONE and mmu.quirks & QUIRK_ROLE_WITHOUT_ACCESS:
        return linked
    gfn = direct_gfn(w.gpa, level, v.guest.mode)
    role = direct_role(mmu, v, va, level, w.access, w.entry[w.level], w.pkey)
    if linked != SC_NONE and mmu.pages[linked].gfn == gfn and mmu.pages[linked].role == role:
        return linked
    return pool_get(mmu, gfn, role)


cdef int _guest_level(const sc_mmu *mmu, const sc_walk *w) noexcept nogil:
    """Direct pages stand for a large page."""
    cdef int level = 1
    while level < 3 and role_direct(mmu.pages[w.table[level] - SC_POOL_HFN].role):
        level += 1
    return level


cdef void cached_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design."""
    mmu.shadow = True
    mmu.by_table = True
    pool_design(mmu)
    mmu.design.exits = 1 << EXIT_CR0 | 1 << EXIT_CR3 | 1 << EXIT_CR4 | 1 << EXIT_EFER
    mmu.design.invariants = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 13
    mmu.design.new_cr3 = _new_cr3
    mmu.design.reset = _reset
    mmu.design.make_room = _make_room
    mmu.design.fast_fault = fault_fast
    mmu.design.root_of = _root_of
    mmu.design.child = _child
    mmu.design.guest_level = _guest_level
    mmu.design.slot_changes = slot_changes
    mmu.design.slot_changed = slot_changed
