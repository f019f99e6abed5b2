"""Boot of the guest kernel: its half of the address space, made as a boot loader does, with paging off."""
from libc.string cimport memset

from shadowcore.engine.bits cimport (
    CR0_PE, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PSE, EFER_LME, EFER_NXE, PTE_A, PTE_D, PTE_G, PTE_P,
    PTE_PS, PTE_W, cr0_pg, pte_nx,
)
from shadowcore.engine.emulate cimport device_store
from shadowcore.engine.registers cimport load_cr0, load_cr3, load_cr4, load_efer
from shadowcore.engine.types cimport MODE_64, MODE_LA57, MODE_PAE, RC_OK, u8, u32, u64
from shadowcore.guest.cpu cimport cpu_go
from shadowcore.guest.state cimport FRAME_BOOT, NO_PROCESS, RC_NOMEM, guest_index, guest_span, sc_guest
from shadowcore.guest.tables cimport entry_frame, entry_read


cdef u64 _frame(sc_guest *g) noexcept nogil:
    """The next frame for good, cleared; 0 if memory is full."""
    cdef u8 zeros[4096]
    cdef u64 frame = g.fresh
    if frame >= g.nframes:
        return 0
    memset(zeros, 0, sizeof(zeros))
    device_store(g.mmu, frame << 12, zeros, 4096)
    g.kind[frame] = FRAME_BOOT
    g.count[frame] = 1
    g.fresh += 1
    return frame


cdef void _set(sc_guest *g, u64 table, u64 index, u64 value) noexcept nogil:
    device_store(g.mmu, table + index * g.pte_size, <const u8 *>&value, g.pte_size)


cdef int _map(sc_guest *g, u64 root, u64 va, u64 gpa, int leaf, u64 flags) noexcept nogil:
    """Map one page at level `leaf` for the kernel."""
    cdef u64 table = root
    cdef u64 entry, made
    cdef int level = g.levels
    while level > leaf:
        entry = entry_read(g, table, guest_index(g, va, level))
        if not entry & PTE_P:
            made = _frame(g)
            if made == 0:
                return RC_NOMEM
            # The root entries of PAE have no rights, and no A.
            entry = made << 12 | (PTE_P if g.mode == MODE_PAE and level == 3 else PTE_P | PTE_W | PTE_A)
            _set(g, table, guest_index(g, va, level), entry)
        table = entry_frame(entry) << 12
        level -= 1
    _set(g, table, guest_index(g, va, leaf), gpa | flags | (PTE_PS if leaf > 1 else 0))
    return RC_OK


cdef int _top(sc_guest *g, u64 va) noexcept nogil:
    """The kernel's top entry for `va`, with an empty table: every root has it from the beginning."""
    cdef u64 frame
    if entry_read(g, g.kernel_root, guest_index(g, va, g.levels)) & PTE_P:
        return RC_OK
    frame = _frame(g)
    if frame == 0:
        return RC_NOMEM
    _set(g, g.kernel_root, guest_index(g, va, g.levels), frame << 12 | PTE_P | PTE_W | PTE_A)
    return RC_OK


cdef int _regions(sc_guest *g, u64 flags) noexcept nogil:
    """What Linux has in the kernel half beside the direct map: the image, a page of text, which is read-only, and its
    data; the IDT, read-only in the entry area; the structs of pages."""
    cdef u64 n
    cdef u64 frame = _frame(g)
    if frame == 0 or _map(g, g.kernel_root, g.text, frame << 12, 1, flags & ~<u64>PTE_W) != RC_OK:
        return RC_NOMEM
    frame = _frame(g)
    if frame == 0 or _map(g, g.kernel_root, g.idt, frame << 12, 1, flags & ~<u64>PTE_W) != RC_OK:
        return RC_NOMEM
    for n in range(g.data_frames):
        if _map(g, g.kernel_root, g.image + (n << 12), (g.data_first + n) << 12, 1, flags) != RC_OK:
            return RC_NOMEM
    for n in range((g.all_frames * 64 + 4095) >> 12):
        frame = _frame(g)
        if frame == 0 or _map(g, g.kernel_root, g.page_structs + (n << 12), frame << 12, 1, flags) != RC_OK:
            return RC_NOMEM
    return RC_OK


cdef int boot_tables(sc_guest *g, int large_level, bint global_) noexcept nogil:
    """The kernel's root with the direct map, in pages of up to `large_level`; page of zeros, entry page, data."""
    cdef u64 flags = PTE_P | PTE_W | PTE_A | PTE_D | (PTE_G if global_ else 0)
    cdef u64 gpa = 0
    cdef u64 top, frame, table
    cdef u32 cpu
    cdef int leaf
    g.fresh = 1                     # frame 0 is never given: 0 says "none"
    frame = _frame(g)
    if frame == 0:
        return RC_NOMEM
    g.kernel_root = frame << 12
    while gpa < g.all_frames << 12:
        leaf = large_level
        while gpa + guest_span(g, leaf) > g.all_frames << 12 or gpa & (guest_span(g, leaf) - 1):
            leaf -= 1
        if _map(g, g.kernel_root, g.direct_map + gpa, gpa, leaf, flags) != RC_OK:
            return RC_NOMEM
        gpa += guest_span(g, leaf)
    g.zero_frame = _frame(g)
    frame = _frame(g)
    if g.zero_frame == 0 or frame == 0:
        return RC_NOMEM
    # The entry page: what user code's root has of the kernel half under isolation.
    if g.isolation or g.regions:
        if _map(g, g.kernel_root, g.entry_va, frame << 12, 1, flags) != RC_OK:
            return RC_NOMEM
    if g.isolation:
        g.entry_index = guest_index(g, g.entry_va, g.levels)
        g.entry_link = entry_read(g, g.kernel_root, g.entry_index)
        if g.mode == MODE_PAE:
            # There the kernel half hangs on one root entry: user roots get a directory of their own for the page.
            top = _frame(g)
            if top == 0:
                return RC_NOMEM
            table = entry_frame(g.entry_link) << 12
            _set(g, top << 12, guest_index(g, g.entry_va, 2), entry_read(g, table, guest_index(g, g.entry_va, 2)))
            g.entry_link = top << 12 | PTE_P
    if g.vmap_stacks:
        g.stack_bits = flags | (pte_nx() if g.nx else 0)
        if _top(g, g.stack_area) != RC_OK:
            return RC_NOMEM
    g.data_first = g.fresh
    while g.fresh < g.data_first + g.data_frames:
        if _frame(g) == 0:
            return RC_NOMEM
    if g.regions:
        if _regions(g, flags) != RC_OK:
            return RC_NOMEM
    else:
        g.image = g.direct_map + (g.data_first << 12)
    g.boot_end = g.fresh
    g.n_free = g.nframes - g.fresh
    g.fresh_end = g.nframes
    gpa = g.all_frames
    while gpa > g.nframes:          # what is above are whole large pages; the lowest is given first
        gpa -= guest_span(g, 2) >> 12
        g.next_free[gpa] = <u32>g.large_head
        g.large_head = gpa
        g.n_large += 1
    for cpu in range(g.n_cpus):
        g.cpus[cpu].current = NO_PROCESS
    cpu_go(g, 0)
    return RC_OK


cdef int boot_registers(sc_guest *g, bint global_) noexcept nogil:
    """Paging on, with the kernel's root, on the processor that is at work."""
    cdef u64 cr4 = CR4_PSE | (CR4_PGE if global_ else 0)
    cdef int rc
    if g.mode >= MODE_PAE:
        cr4 |= CR4_PAE
    if g.mode == MODE_LA57:
        cr4 |= CR4_LA57
    rc = load_efer(g.mmu, g.v, (EFER_NXE if g.nx else 0) | (EFER_LME if g.mode >= MODE_64 else 0))
    if rc == RC_OK:
        rc = load_cr4(g.mmu, g.v, cr4)
    if rc == RC_OK:
        rc = load_cr3(g.mmu, g.v, g.kernel_root)
    if rc == RC_OK:
        rc = load_cr0(g.mmu, g.v, cr0_pg() | CR0_WP | CR0_PE)
    if rc == RC_OK and g.pcid:
        rc = load_cr4(g.mmu, g.v, cr4 | CR4_PCIDE)
    return rc
