"""Loads of CR0, CR3, CR4, EFER, PKRU and EFLAGS.AC: RC_OK, or RC_GP and nothing changed (SDM vol. 3, 2.5, 4.1).

A bit that is not defined is of one of three kinds. CR4 and EFER refuse all of theirs, CR0 its upper half, CR3 in
long mode those from MAXPHYADDR on (2.5; vol. 2, MOV to control registers; vol. 4, IA32_EFER). Other reserved bits of
CR0 stay clear whatever is written (vol. 2). Bits of CR3 that its tables call ignored (4-3, 4-7, 4-12) are kept and
mean nothing: they read as they were written. Outside of long mode the operand has 32 bits, so that CR3 gets no
others. The privilege level and CS.L are the caller's business: no load is refused for them.
"""
from libc.string cimport memcmp, memcpy, memset

from shadowcore.engine.bits cimport (
    CR0_CD, CR0_ET, CR0_NW, CR0_PE, CR0_WP, CR4_FSGSBASE, CR4_LA57, CR4_OSXSAVE, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE,
    CR4_PSE, CR4_SMAP, CR4_SMEP, CR4_UMIP, EFER_FFXSR, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, EFER_TCE, cr0_ignored,
    cr0_kept, cr0_pg, pte_addr,
)
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.counters cimport EXIT_CR0, EXIT_CR3, EXIT_CR4, EXIT_EFER, sc_stats
from shadowcore.engine.design cimport design_exit, design_new_cr3, design_reset
from shadowcore.engine.features cimport (
    FEAT_COUNT, FEAT_FSGSBASE, FEAT_GBPAGES, FEAT_LA57, FEAT_NX, FEAT_PCID, FEAT_PKU, FEAT_PSE36, FEAT_SMAP, FEAT_SMEP,
    FEAT_UMIP, FEAT_XSAVE,
)
from shadowcore.engine.flushes cimport FLUSH_CONTEXT, FLUSH_CR3, flush_lost
from shadowcore.engine.hooks cimport POINT_POST_CR3, audit_point
from shadowcore.engine.memory cimport mem_guest_frame, mem_touch, sc_mem
from shadowcore.engine.quirks cimport QUIRK_ACCESSED_EARLY, QUIRK_IGNORED_BITS_REFUSED
from shadowcore.engine.state cimport SC_MAX_PREV, memo_drop, sc_loaded, sc_mmu, sc_prev, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport tlb_flush_all, tlb_flush_pcid
from shadowcore.engine.types cimport (
    MODE_32, MODE_64, MODE_LA57, MODE_OFF, MODE_PAE, RC_GP, RC_OK, SC_NONE, u8, u32, u64,
)
from shadowcore.engine.walker cimport paging_refused, paging_reserved, pdptes_valid

sc_check(FEAT_COUNT <= 8 * sizeof((<sc_vcpu *>NULL).features))


cdef inline int _mode(u64 cr0, u64 cr4, u64 efer) noexcept nogil:
    if not cr0 & cr0_pg():
        return MODE_OFF
    if efer & EFER_LME:
        return MODE_LA57 if cr4 & CR4_LA57 else MODE_64
    return MODE_PAE if cr4 & CR4_PAE else MODE_32


cdef inline bint _has(const sc_vcpu *v, u32 feature) noexcept nogil:
    return v.features & feature != 0


cdef u64 _cr4_allowed(const sc_vcpu *v) noexcept nogil:
    return (0x7FF | (CR4_UMIP if _has(v, FEAT_UMIP) else 0) | (CR4_LA57 if _has(v, FEAT_LA57) else 0)
            | (CR4_FSGSBASE if _has(v, FEAT_FSGSBASE) else 0) | (CR4_PCIDE if _has(v, FEAT_PCID) else 0)
            | (CR4_OSXSAVE if _has(v, FEAT_XSAVE) else 0) | (CR4_SMEP if _has(v, FEAT_SMEP) else 0)
            | (CR4_SMAP if _has(v, FEAT_SMAP) else 0) | (CR4_PKE if _has(v, FEAT_PKU) else 0))


cdef bint _read_pdptes(const sc_mmu *mmu, const sc_vcpu *v, u64 cr3, u64 *pdpte) noexcept nogil:
    """Read the four PAE root entries; False if one may not be loaded. Where there is no RAM, none is present."""
    cdef u8 *frame = mem_guest_frame(mmu.mem, cr3 & 0xFFFFFFE0U)
    memset(pdpte, 0, 32)
    if frame != NULL:
        mem_touch(mmu.mem, (cr3 & 0xFFFFFFE0U) >> 12, False)
        memcpy(pdpte, frame + (cr3 & 0xFE0), 32)
    return pdptes_valid(pdpte, v.maxphyaddr)


cdef bint _take_pdptes(sc_vcpu *v, const u64 *pdpte) noexcept nogil:
    """True if they are others than before."""
    if memcmp(v.guest.pdpte, pdpte, sizeof(v.guest.pdpte)) == 0:
        return False
    memcpy(v.guest.pdpte, pdpte, sizeof(v.guest.pdpte))
    return True


cdef inline sc_loaded _before(const sc_vcpu *v) noexcept nogil:
    return sc_loaded(v.cr0, v.cr3, v.cr4, v.efer, False, False)


cdef void vcpu_apply(sc_vcpu *v) noexcept nogil:
    """Derive what walks need from the registers."""
    cdef int mode = _mode(v.cr0, v.cr4, v.efer)
    v.guest.mode = mode
    v.guest.root = v.cr3 & (pte_addr() if mode >= MODE_64 else 0xFFFFF000U)
    v.guest.wp = v.cr0 & CR0_WP != 0
    v.guest.nxe = v.efer & EFER_NXE != 0
    v.guest.smep = v.cr4 & CR4_SMEP != 0
    v.guest.smap = v.cr4 & CR4_SMAP != 0
    v.guest.pke = mode >= MODE_64 and v.cr4 & CR4_PKE != 0
    v.guest.fetch_coded = v.guest.smep or (v.guest.nxe and mode >= MODE_PAE)
    paging_reserved(&v.guest, v.maxphyaddr, _has(v, FEAT_GBPAGES), v.cr4 & CR4_PSE != 0, _has(v, FEAT_PSE36))
    # Under a shadow MMU the processor runs with write protection for supervisor code whatever the guest set, so
    # that stores to guest tables are always seen.
    v.hw.wp = True
    v.hw.nxe = v.guest.nxe
    v.hw.smep = v.guest.smep
    v.hw.smap = v.guest.smap
    v.hw.pke = v.guest.pke
    v.hw.pkru = v.guest.pkru
    v.hw.ac = v.guest.ac
    v.hw.fetch_coded = v.guest.fetch_coded
    v.hw.mode = MODE_64
    paging_reserved(&v.hw, 52, True, False, False)
    v.hw.large_levels = 0
    v.hw.mode = mode if mode >= MODE_64 else MODE_PAE
    paging_refused(&v.guest)
    paging_refused(&v.hw)


cdef inline void _drop_translations(const sc_mmu *mmu, sc_vcpu *v, bint changed) noexcept nogil:
    """CR0, CR4 or EFER changes: the TLB forgets everything (SDM 4.10.4.1 asks it for PG, WP, PGE, PCIDE, SMEP, ...)."""
    if v.tlb != NULL and changed:
        tlb_flush_all(v.tlb, flush_lost(mmu, FLUSH_CONTEXT))


cdef void vcpu_init(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """State at reset, paging off; the roots for it are put in place."""
    cdef int slot
    v.cr0 = 0x60000010
    v.guest.accessed_early = mmu.quirks & QUIRK_ACCESSED_EARLY != 0
    v.flood_gfn = <u64>-1
    for slot in range(4):
        v.roots[slot] = SC_NONE
    for slot in range(SC_MAX_PREV):
        v.prev[slot] = sc_prev(0, SC_NONE, 0)
    vcpu_apply(v)
    design_reset(mmu, v, NULL)


cdef bint registers_possible(const sc_vcpu *v) noexcept nogil:
    """Loads of registers can lead to what `v` has in them: they are made, on a processor without memory."""
    cdef sc_mmu mmu
    cdef sc_mem mem
    cdef sc_stats stats
    cdef sc_vcpu other
    memset(&mmu, 0, sizeof(mmu))
    memset(&mem, 0, sizeof(mem))
    memset(&stats, 0, sizeof(stats))
    memset(&other, 0, sizeof(other))
    mmu.mem = &mem
    mmu.stats = &stats
    other.features = v.features
    other.maxphyaddr = v.maxphyaddr
    other.guest.amd = v.guest.amd
    vcpu_init(&mmu, &other)
    # What is in CR3, and in the PAE root entries, may be from another mode.
    if v.cr3 >> v.maxphyaddr or not pdptes_valid(v.guest.pdpte, v.maxphyaddr):
        return False
    if (load_efer(&mmu, &other, v.efer & ~<u64>EFER_LMA) != RC_OK
            or load_cr4(&mmu, &other, v.cr4 & ~<u64>CR4_PCIDE) != RC_OK
            or load_cr0(&mmu, &other, v.cr0) != RC_OK or load_cr4(&mmu, &other, v.cr4) != RC_OK):
        return False
    return other.cr0 == v.cr0 and other.cr4 == v.cr4 and other.efer == v.efer


cdef int load_cr0(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil:
    cdef u64 pdpte[4]
    cdef sc_loaded before = _before(v)
    cdef bint pg = value & cr0_pg() != 0
    if value >> 32 or (value & CR0_NW and not value & CR0_CD) or (pg and not value & CR0_PE):
        return RC_GP
    if value & cr0_ignored() and mmu.quirks & QUIRK_IGNORED_BITS_REFUSED:
        return RC_GP
    value = cr0_kept(value)
    if pg and v.efer & EFER_LME and not v.cr4 & CR4_PAE:
        return RC_GP
    if not pg and v.cr4 & CR4_PCIDE:
        return RC_GP
    # SDM 4.4.1: the PAE root entries are read again when CD, NW or PG changes.
    if _mode(value, v.cr4, v.efer) == MODE_PAE and (value ^ v.cr0) & (CR0_CD | CR0_NW | cr0_pg()):
        if not _read_pdptes(mmu, v, v.cr3, pdpte):
            return RC_GP
        before.pdptes = _take_pdptes(v, pdpte)
    design_exit(mmu, v.number, EXIT_CR0, value)
    _drop_translations(mmu, v, value != v.cr0)
    v.cr0 = value
    v.efer &= ~<u64>EFER_LMA
    if pg and v.efer & EFER_LME:
        v.efer |= EFER_LMA
    vcpu_apply(v)
    memo_drop(mmu)
    design_reset(mmu, v, &before)
    return RC_OK


cdef int load_cr3(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil:
    cdef u64 pdpte[4]
    cdef sc_loaded before           # of the others nobody asks here
    cdef u64 reserved = 0
    cdef u64 ignored = 7
    before.cr3 = v.cr3
    before.tagged = before.pdptes = False
    if v.efer & EFER_LMA:
        reserved = ~((<u64>1 << v.maxphyaddr) - 1)
        ignored = 0xFE0
        if v.cr4 & CR4_PCIDE:
            ignored = 0
            before.tagged = value >> 63
            value &= ~(<u64>1 << 63)        # bit 63 keeps what the TLB holds for the PCID; it is not stored
    else:
        value &= 0xFFFFFFFFU
    if value & reserved or (value & ignored and mmu.quirks & QUIRK_IGNORED_BITS_REFUSED):
        return RC_GP
    if v.guest.mode == MODE_PAE:
        if not _read_pdptes(mmu, v, value, pdpte):
            return RC_GP
        before.pdptes = _take_pdptes(v, pdpte)
    design_exit(mmu, v.number, EXIT_CR3, value)
    v.cr3 = value
    memo_drop(mmu)
    if v.tlb != NULL and not before.tagged:
        tlb_flush_pcid(v.tlb, vcpu_pcid(v), flush_lost(mmu, FLUSH_CR3))
    if v.guest.mode != MODE_OFF:
        v.guest.root = v.cr3 & (pte_addr() if v.guest.mode >= MODE_64 else 0xFFFFF000U)
    design_new_cr3(mmu, v, &before)
    audit_point(mmu, POINT_POST_CR3)
    return RC_OK


cdef int load_cr4(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil:
    cdef u64 pdpte[4]
    cdef sc_loaded before = _before(v)
    if value & ~_cr4_allowed(v):
        return RC_GP
    if v.efer & EFER_LMA and (not value & CR4_PAE or (value ^ v.cr4) & CR4_LA57):
        return RC_GP
    if value & CR4_PCIDE and not v.cr4 & CR4_PCIDE and (not v.efer & EFER_LMA or v.cr3 & 0xFFF):
        return RC_GP
    # SDM 4.4.1: the PAE root entries are read again when PAE, PGE, PSE or SMEP changes.
    if (_mode(v.cr0, value, v.efer) == MODE_PAE
            and (value ^ v.cr4) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP)):
        if not _read_pdptes(mmu, v, v.cr3, pdpte):
            return RC_GP
        before.pdptes = _take_pdptes(v, pdpte)
    design_exit(mmu, v.number, EXIT_CR4, value)
    _drop_translations(mmu, v, value != v.cr4)
    v.cr4 = value
    vcpu_apply(v)
    memo_drop(mmu)
    design_reset(mmu, v, &before)
    return RC_OK


cdef int load_efer(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil:
    cdef sc_loaded before = _before(v)
    cdef u64 allowed = EFER_SCE | EFER_LME | EFER_LMA | (EFER_NXE if _has(v, FEAT_NX) else 0)
    if v.guest.amd:
        allowed |= EFER_FFXSR | EFER_TCE
        if (value ^ v.efer) & EFER_LMA:     # APM vol. 2, 3.1.7: what is written has to be what is there
            return RC_GP
    if value & ~allowed or (v.cr0 & cr0_pg() and (value ^ v.efer) & EFER_LME):
        return RC_GP
    design_exit(mmu, v.number, EXIT_EFER, value)
    _drop_translations(mmu, v, (value ^ v.efer) & EFER_NXE)
    v.efer = (value & ~<u64>EFER_LMA) | (v.efer & EFER_LMA)
    vcpu_apply(v)
    memo_drop(mmu)
    design_reset(mmu, v, &before)
    return RC_OK


cdef void load_pkru(sc_mmu *mmu, sc_vcpu *v, u64 value) noexcept nogil:
    if value != v.guest.pkru:
        memo_drop(mmu)
    v.guest.pkru = v.hw.pkru = <u32>value


cdef void load_ac(sc_mmu *mmu, sc_vcpu *v, bint on) noexcept nogil:
    if v.guest.smap and on != v.guest.ac:
        memo_drop(mmu)
    ac_put(v, on)


cdef void ac_put(sc_vcpu *v, bint on) noexcept nogil:
    """EFLAGS.AC, for who sees to it himself that the memo serves no access by it."""
    if v.guest.ac == on:
        return
    v.guest.ac = v.hw.ac = on
    paging_refused(&v.guest)
    paging_refused(&v.hw)


cdef void load_init(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """INIT: CR0 keeps CD and NW, and has ET; CR2, CR3, CR4, EFER and EFLAGS.AC are 0, PKRU stays (SDM vol. 3, 10.1;
    EFER: APM vol. 2, table 14-1); the TLB is empty. It is no instruction of this processor, so no exit."""
    v.cr0 = (v.cr0 & (CR0_CD | CR0_NW)) | CR0_ET
    v.cr2 = v.cr3 = v.cr4 = v.efer = 0
    v.cpl = 0
    v.guest.ac = False
    memset(v.guest.pdpte, 0, sizeof(v.guest.pdpte))
    if v.tlb != NULL:
        tlb_flush_all(v.tlb, flush_lost(mmu, FLUSH_CONTEXT))
    vcpu_apply(v)
    memo_drop(mmu)
    design_reset(mmu, v, NULL)
