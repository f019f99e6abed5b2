"""The invariants of a design whose leaf tables may be unsync: a checker each, and its docstring is the invariant.

Those of I4 to I9 are in invariants.pyx. As there: whatever is in the arrays, the checkers stay within them and end.
"""
from shadowcore.engine.absent cimport is_marker
from shadowcore.engine.bits cimport (
    PTE_D, PTE_P, PTE_PS, SPTE_MARK, SPTE_MMU_W, level_mask, pte_addr, pte_pkey, pte_rights,
)
from shadowcore.engine.features cimport FEAT_PKU
from shadowcore.engine.invariants cimport (
    S_ABSENT, S_CLEAN, S_DEVICE, S_FRAME, S_GAUGE, S_HEAD, S_LAGS, S_LEAF, S_LEAF_FOREIGN, S_LEAF_MISSING,
    S_MAPPED, S_MARKS, S_MARK_MISSING, S_PREVIOUS, S_RIGHTS, S_RMAP_MISSING, S_TABLE, S_UNPROTECTED, S_UNSYNC,
    audit_head_tells, audit_listed, audit_marker, audit_protected, audit_report, audit_stopped, entry_gpte, sc_audit,
)
from shadowcore.engine.lagging cimport LAGGING_SYNCED
from shadowcore.engine.memory cimport (
    mem_frame, mem_gfn, mem_is_rom, mem_leaf_frame, mem_pool_page, sc_no_frame,
)
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.quirks cimport QUIRK_ROLE_WITHOUT_NXE
from shadowcore.engine.rmap cimport list_first, list_next
from shadowcore.engine.role cimport (
    ROLE_GLEVELS, ROLE_INVALID, ROLE_PKEY, ROLE_PSE, ROLE_WP0, role_access, role_direct, role_field,
    role_level, role_pte_size,
)
from shadowcore.engine.spte cimport spte_is_writable, spte_maps
from shadowcore.engine.state cimport REQUEST_OBSOLETE, SC_MAX_PREV, page_is_dying, sc_mmu, sc_prev, sc_vcpu
from shadowcore.engine.sync cimport device_is_stale, device_rights, direct_page_gfn
from shadowcore.engine.types cimport ACC_U, ACC_W, MODE_32, MODE_64, SC_NONE, u32, u64


cdef inline bint _has_keys(const sc_mmu *mmu, const sc_page *page) noexcept nogil:
    return (role_field(page.role, ROLE_GLEVELS, 15) >= MODE_64 and mmu.n_vcpus > 0
            and mmu.vcpus[0].features & FEAT_PKU != 0)


cdef inline bint _is_large(const sc_page *page, u64 gpte) noexcept nogil:
    return gpte & PTE_PS and 2 <= role_level(page.role) <= 3 and (
        role_pte_size(page.role) == 8 or role_field(page.role, ROLE_PSE, 1))


cdef inline u64 _named(const sc_page *page, u32 index, u64 gpte, bint large) noexcept nogil:
    """The gfn that the guest's entry names for entry `index`: of a table, or the first of what it maps."""
    if role_pte_size(page.role) == 8:
        if large:
            return (gpte & pte_addr() & ~level_mask(role_level(page.role))) >> 12
        return (gpte & pte_addr()) >> 12
    if large:                       # two entries of the shadow stand for one of 4 MiB
        return (((gpte & 0xFFC00000U) | (((gpte >> 13) & 0xFF) << 32)) >> 12) + 512 * (index & 1)
    return (gpte & 0xFFFFF000U) >> 12


cdef inline u32 _allowed(const sc_page *page, u64 gpte, u32 granted) noexcept nogil:
    """Rights that a leaf which grants `granted` may have of the guest's entry. What is W and not U may stand for a
    supervisor's store with CR0.WP off."""
    cdef u32 allowed = role_access(page.role) & pte_rights(gpte)
    if role_field(page.role, ROLE_WP0, 1) and not granted & ACC_U:
        allowed |= ACC_W
    return allowed


cdef void _check_leaf(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, a leaf of 4 KiB, 2 MiB or 1 GiB."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u64 spte = mmu.table[number * 512 + index]
    cdef u64 frame = mem_leaf_frame(mmu.mem, spte)
    cdef u32 granted = pte_rights(spte)
    cdef u32 pkey = role_field(page.role, ROLE_PKEY, 15)
    cdef u32 allowed = role_access(page.role)
    cdef u64 gpte, named
    cdef bint large = role_level(page.role) > 1
    if role_direct(page.role):
        named = direct_page_gfn(mmu, number * 512 + index)
    else:
        gpte = entry_gpte(mmu, page, index)
        if not gpte & PTE_P:
            audit_report(a, 1, S_ABSENT, number, index, page.gfn)
            return
        if large and not _is_large(page, gpte):
            audit_report(a, 1, S_TABLE, number, index, page.gfn)
            return
        named = _named(page, index, gpte, large)
        allowed = _allowed(page, gpte, granted)
        pkey = pte_pkey(gpte)
        if granted & ACC_W and not gpte & PTE_D and not mem_is_rom(mmu.mem, page.gfn):
            audit_report(a, 1, S_CLEAN, number, index, page.gfn)
    if frame < mmu.mem.nframes and mem_gfn(mmu.mem, frame) != named:
        audit_report(a, 1, S_FRAME, number, index, named)
    if granted & ~allowed or (_has_keys(mmu, page) and pte_pkey(spte) != pkey):
        audit_report(a, 1, S_RIGHTS, number, index, page.gfn)


cdef void _check_device(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, an entry that remembers a device: it names the gfn that the gpte does, where there is no RAM, and has no
    rights that the guest's tables do not give."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u64 spte = mmu.table[number * 512 + index]
    cdef u64 gfn = (spte & pte_addr()) >> 12
    cdef u32 allowed = role_access(page.role)
    cdef u64 gpte
    cdef bint fits = spte & SPTE_MARK and mem_frame(mmu.mem, gfn) == sc_no_frame()
    if role_direct(page.role):
        fits = fits and direct_page_gfn(mmu, number * 512 + index) == gfn
    else:
        gpte = entry_gpte(mmu, page, index)
        allowed &= pte_rights(gpte)
        if not gpte & PTE_D and not mem_is_rom(mmu.mem, page.gfn):
            allowed &= ~<u32>ACC_W
        fits = fits and gpte & PTE_P and _named(page, index, gpte, False) == gfn
    if not fits or device_rights(spte) & ~allowed:
        audit_report(a, 1, S_DEVICE, number, index, gfn)


cdef void _check_link(sc_mmu *mmu, u32 number, u32 index, sc_audit *a) noexcept nogil:
    """I1, above the leaves: a present entry leads to the shadow of the table that its gpte names, with the rights down
    to there, or to a direct page where the gpte is a large page; a direct page's to a direct page of the same rights,
    for its part of what that maps."""
    cdef sc_page *page = &mmu.pages[number]
    cdef u32 target = mem_pool_page(mmu.table[number * 512 + index])
    cdef u32 pkey = role_field(page.role, ROLE_PKEY, 15)
    cdef u32 allowed = role_access(page.role)
    cdef sc_page *child
    cdef u64 gpte, named
    cdef bint large = True
    if target >= mmu.pool_pages:
        return                      # a matter of I4
    child = &mmu.pages[target]
    if role_direct(page.role):
        named = direct_page_gfn(mmu, number * 512 + index)
    else:
        gpte = entry_gpte(mmu, page, index)
        if not gpte & PTE_P:
            audit_report(a, 1, S_ABSENT, number, index, page.gfn)
            return
        large = role_direct(child.role)
        if large != _is_large(page, gpte):
            audit_report(a, 1, S_TABLE, number, index, page.gfn)
            return
        named = _named(page, index, gpte, large)
        allowed &= pte_rights(gpte)
        if large:
            allowed = _allowed(page, gpte, role_access(child.role))
            pkey = pte_pkey(gpte)
            if role_access(child.role) & ACC_W and not gpte & PTE_D and not mem_is_rom(mmu.mem, page.gfn):
                audit_report(a, 1, S_CLEAN, number, index, page.gfn)
    if named != child.gfn or role_direct(child.role) != large:
        audit_report(a, 1, S_FRAME if large else S_TABLE, number, index, named if large else page.gfn)
    if (role_access(child.role) & ~allowed or (role_access(child.role) != allowed and not large)
            or (large and _has_keys(mmu, page) and role_field(child.role, ROLE_PKEY, 15) != pkey)):
        audit_report(a, 1, S_RIGHTS, number, index, page.gfn)


cdef void check_synced_mappings(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I1: each entry of a synced page says what the guest's tables say, with rights no wider, and W only if the gpte is
    dirty: leaves of every size, of direct pages too, devices, links, markers.

    Left out are unsync pages. An entry of those maps what its gpte named at its last sync or since, and no state tells
    what that was. With the quirk ROLE_WITHOUT_NXE so are those of tables of 4-byte entries: a page made with CR4.PSE on
    is found again with it off, and serves what it was not made for."""
    cdef u32 number, index
    cdef u64 value
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active or mmu.pages[number].unsync:
            continue
        if mmu.quirks & QUIRK_ROLE_WITHOUT_NXE and role_field(mmu.pages[number].role, ROLE_GLEVELS, 15) == MODE_32:
            continue
        for index in range(512):
            value = mmu.table[number * 512 + index]
            if value == 0:
                continue
            if spte_maps(value, role_level(mmu.pages[number].role)):
                _check_leaf(mmu, number, index, a)
            elif value & PTE_P:
                _check_link(mmu, number, index, a)
            elif is_marker(value):
                audit_marker(mmu, number, index, a)
            elif role_level(mmu.pages[number].role) == 1 and not device_is_stale(mmu, value):
                _check_device(mmu, number, index, a)


cdef void check_synced_protection(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I2: no leaf that is writable, or is not for a dirty log alone, maps a gfn that a synced page shadows, not direct,
    nor one that any page above level 1 shadows."""
    cdef u32 number, index
    cdef u64 frame, at, n, value
    cdef int level
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        level = role_level(mmu.pages[number].role)
        if not mmu.pages[number].active:
            continue
        for index in range(512):
            value = mmu.table[number * 512 + index]
            if not spte_maps(value, level) or not (spte_is_writable(value) or value & SPTE_MMU_W):
                continue
            frame = mem_leaf_frame(mmu.mem, value)
            n = <u64>1 << 9 * (level - 1)
            if frame >= mmu.mem.nframes or n > mmu.mem.nframes - frame:
                continue            # a matter of I11
            if level > 1 and mmu.no_large[level - 2][frame >> 9 * (level - 1)] == 0:
                continue            # no guest table has a shadow there (I6)
            for at in range(frame, frame + n):
                if mmu.frames[at].shadowed and audit_protected(mmu, at):
                    audit_report(a, 2, S_UNPROTECTED, number, index, mem_gfn(mmu.mem, at))


cdef u32 _check_list(sc_mmu *mmu, u32 head, int level, u64 block, u64 most, u64 *listed, sc_audit *a) noexcept nogil:
    """Each member of a list of the reverse map is a leaf of `level` that maps the block, or frame, that the list stands
    for. listed: members so far, of all lists of that level, `most` of which there are. Returns the members of this."""
    cdef u32 member = list_first(head)
    cdef u32 n = 0
    cdef u64 value
    while member:
        value = 0
        if member <= mmu.pool_pages * 512:
            value = mmu.table[member - 1]
        if (not spte_maps(value, level) or role_level(mmu.pages[(member - 1) >> 9].role) != level
                or mem_leaf_frame(mmu.mem, value) >> 9 * (level - 1) != block or listed[0] >= most):
            audit_report(a, 11, S_LEAF_FOREIGN, (member - 1) >> 9, (member - 1) & 511,
                         mem_gfn(mmu.mem, block << 9 * (level - 1)))
            return n
        n += 1
        listed[0] += 1
        member = list_next(mmu, head, member)
    if not audit_head_tells(mmu, head):
        audit_report(a, 11, S_HEAD, SC_NONE, 0, mem_gfn(mmu.mem, block << 9 * (level - 1)))
    return n


cdef void check_leaves(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I3: the reverse map of a gfn lists the writable leaves that map it, each once.

    I11: it lists all leaves, and nothing else, large ones by the block that they map. Leaves map frames, large ones
    whole blocks; how many map a frame, and how many there are of each size, is what the counts say."""
    cdef u32 number, index, spte, n
    cdef u32 *head
    cdef u64 value, frame, block
    cdef u64 leaves[3]
    cdef u64 listed[3]
    cdef int level
    for level in range(3):
        leaves[level] = listed[level] = 0
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        level = role_level(mmu.pages[number].role)
        if not mmu.pages[number].active or not 1 <= level <= 3:
            continue
        for index in range(512):
            spte = number * 512 + index
            value = mmu.table[spte]
            if not spte_maps(value, level):
                continue
            leaves[level - 1] += 1
            frame = mem_leaf_frame(mmu.mem, value)
            block = <u64>1 << 9 * (level - 1)
            if (frame >= mmu.mem.nframes or block > mmu.mem.nframes - frame or frame & (block - 1)
                    or mem_gfn(mmu.mem, frame) == sc_no_frame()
                    or mem_gfn(mmu.mem, frame + block - 1) == sc_no_frame()):
                audit_report(a, 11, S_LEAF, number, index, mmu.pages[number].gfn)
                continue
            head = &mmu.frames[frame].rmap
            if level > 1:
                head = &mmu.large_rmap[level - 2][frame >> 9 * (level - 1)]
            if not audit_listed(mmu, head[0], spte):
                audit_report(a, 3 if spte_is_writable(value) else 11,
                             S_RMAP_MISSING if spte_is_writable(value) else S_LEAF_MISSING, number, index,
                             mem_gfn(mmu.mem, frame))
    for frame in range(mmu.mem.nframes):
        n = _check_list(mmu, mmu.frames[frame].rmap, 1, frame, leaves[0], &listed[0], a)
        if n & 0xFFFF != mmu.mapped[frame]:
            audit_report(a, 11, S_MAPPED, SC_NONE, 0, mem_gfn(mmu.mem, frame))
    for level in range(2, 4):
        for block in range((mmu.mem.nframes >> 9 * (level - 1)) + 1):
            _check_list(mmu, mmu.large_rmap[level - 2][block], level, block, leaves[level - 1], &listed[level - 1], a)
    for level in range(3):
        if listed[level] != leaves[level]:
            audit_report(a, 11, S_LEAF_MISSING, SC_NONE, level + 1, 0)
    if leaves[0] != mmu.stats.pages_4k or leaves[1] != mmu.stats.pages_2m or leaves[2] != mmu.stats.pages_1g:
        audit_report(a, 11, S_GAUGE, SC_NONE, 0, 0)


cdef inline u32 _marked(const sc_mmu *mmu, u32 number) noexcept nogil:
    """Marks of a page."""
    cdef u32 marks = 0
    cdef u32 index
    for index in range(512):
        marks += mmu.below[number * 8 + (index >> 6)] >> (index & 63) & 1
    return marks


cdef void check_marks(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I10: only shadows of a guest's leaf tables are unsync; each present link to an unsync page, or to a page with
    marks, is marked; a page counts its marks, and a leaf table has none. So whatever is unsync is found from above.

    A mark may be one too many: those with nothing below them go when a walk comes by, and entries that are not present
    may keep theirs."""
    cdef u32 number, index, marks, target
    cdef u64 value
    cdef u64 unsync = 0
    for number in range(mmu.pool_pages):
        if audit_stopped(mmu, number):
            return
        if not mmu.pages[number].active:
            continue                # unmarked, or a root that goes (I6)
        marks = _marked(mmu, number)
        if marks != mmu.pages[number].unsync_children or (marks and role_level(mmu.pages[number].role) == 1):
            audit_report(a, 10, S_MARKS, number, 0, mmu.pages[number].gfn)
        if mmu.pages[number].unsync:
            unsync += 1
            if role_level(mmu.pages[number].role) != 1 or role_direct(mmu.pages[number].role):
                audit_report(a, 10, S_UNSYNC, number, 0, mmu.pages[number].gfn)
        if role_level(mmu.pages[number].role) == 1:
            continue
        for index in range(512):
            value = mmu.table[number * 512 + index]
            if not value & PTE_P or value & PTE_PS:
                continue
            target = mem_pool_page(value)
            if (target < mmu.pool_pages and (mmu.pages[target].unsync or mmu.pages[target].unsync_children)
                    and not mmu.below[number * 8 + (index >> 6)] >> (index & 63) & 1):
                audit_report(a, 10, S_MARK_MISSING, number, index, mmu.pages[target].gfn)
    if unsync != mmu.stats.mmu_unsync:
        audit_report(a, 10, S_GAUGE, SC_NONE, 0, 0)


cdef bint _previous_fits(const sc_mmu *mmu, const sc_vcpu *v, const sc_prev *prev) noexcept nogil:
    cdef const sc_page *page
    cdef u32 invalid = <u32>1 << ROLE_INVALID
    if prev.page >= mmu.pool_pages or v.guest.mode < MODE_64:
        return False
    page = &mmu.pages[prev.page]
    if page.gfn != (prev.cr3 & pte_addr()) >> 12 or page.role & ~invalid != mmu.design.root_role(mmu, v, 0):
        return False
    # One that was zapped: the vcpu lets go of it before its guest goes on.
    return page.active or (page_is_dying(page) and v.requests & REQUEST_OBSOLETE)


cdef void check_previous_roots(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I12: the root of an earlier CR3 that a vcpu keeps is a page in use, the root for that CR3 by the registers as
    they are; it is held (I7 counts it)."""
    cdef u32 i, k
    cdef const sc_vcpu *v
    for i in range(mmu.n_vcpus):
        v = mmu.vcpus[i]
        for k in range(SC_MAX_PREV):
            if v.prev[k].page != SC_NONE and (k >= mmu.prev_roots or not _previous_fits(mmu, v, &v.prev[k])):
                audit_report(a, 12, S_PREVIOUS, v.prev[k].page, k, v.prev[k].cr3 >> 12)


cdef void check_synced_roots(sc_mmu *mmu, sc_audit *a) noexcept nogil:
    """I12: when its roots have been put in place or synced, nothing below them is unsync: they have no marks (I10)."""
    cdef const sc_vcpu *v = mmu.vcpus[mmu.synced]
    cdef int slot
    for slot in range(4):
        if v.roots[slot] < mmu.pool_pages and mmu.pages[v.roots[slot]].unsync_children:
            audit_report(a, 12, S_LAGS, v.roots[slot], 0, mmu.pages[v.roots[slot]].gfn)


cdef void lagging_audit(sc_mmu *mmu, void *found, u32 which) noexcept nogil:
    """sc_design.audit."""
    cdef sc_audit *a = <sc_audit *>found
    if which & LAGGING_SYNCED:
        check_synced_roots(mmu, a)
    if which >> 3 & 1 or which >> 11 & 1:
        check_leaves(mmu, a)
    if which >> 10 & 1:
        check_marks(mmu, a)
    if which >> 12 & 1:
        check_previous_roots(mmu, a)
    if which >> 1 & 1:
        check_synced_mappings(mmu, a)
    if which >> 2 & 1:
        check_synced_protection(mmu, a)
