"""The virtual processor: its registers, single accesses, translations without side effect, and batches.

Past 500 lines, for it is one class, which forwards.
"""
import numpy as np

from cpython.long cimport PyLong_AsLong, PyLong_AsUnsignedLongLong, PyLong_CheckExact
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from shadowcore.engine.access cimport (
    OP_ADD, OP_AND, OP_CMPXCHG, OP_FETCH, OP_INVLPG, OP_INVPCID, OP_OR, OP_READ, OP_WRITE, OP_XCHG, OP_XOR,
    access_do, access_implicit, sc_op, sc_result, vcpu_op,
)
from shadowcore.engine.batch cimport run_batch
from shadowcore.engine.bits cimport PTE_P, is_canonical
from shadowcore.engine.exits cimport exits_next
from shadowcore.engine.features cimport FEAT_COUNT
from shadowcore.engine.memo cimport sc_memo
from shadowcore.engine.memory cimport SC_WRITTEN, mem_pool_hpa
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.registers cimport (
    load_ac, load_cr0, load_cr3, load_cr4, load_efer, load_init, load_pkru, load_refused, registers_possible,
    vcpu_apply, vcpu_init,
)
from shadowcore.engine.roots cimport root_fits
from shadowcore.engine.state cimport (
    REQUEST_ROOTS, SC_MAX_VCPUS, linear_address, linear_exists, sc_mmu, sc_prev, sc_vcpu,
)
from shadowcore.engine.tlb cimport (
    TLB_CACHES, TLB_PAGES, TLB_SIZES, sc_tlb, sc_tlb_bank, sc_tlb_entry, tlb_index, tlb_valid,
)
from shadowcore.engine.translation cimport Translation, walk_levels
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, MODE_OFF, PF_I, PF_U, PF_W, RC_AUDIT, RC_GP, RC_MMIO, RC_OK, RC_PF, RC_UD, SC_NONE, u32, u64,
)
from shadowcore.engine.walker cimport probe_walk, sc_walk

from shadowcore._version import __version__
from shadowcore.config import FEATURES as _FEATURES, Features, check_bool, check_int, check_ints, taken
from shadowcore.engine.memory import allocate, window
from shadowcore.engine.tlbs import caches as tlb_caches, check_tlb, host as tlb_host, rows as tlb_rows
from shadowcore.errors import ConfigError, GeneralProtection, MMIOAccess, PageFault, UndefinedInstruction

TLB_DTYPE = np.dtype([
    ("page", "<u8"), ("gpa", "<u8"), ("page_size", "<u4"), ("pcid", "<u2"), ("access", "u1"), ("pkey", "u1"),
    ("dirty", "u1"), ("global_", "u1"), ("level", "u1"), ("bank", "u1"),
])


cdef object _ARRAY = np.ndarray
cdef object _ITSELF = object()      # in the place of `user`: an implicit access
_READ = "r"
cdef dict _ACCESS = {_READ: 0, "w": PF_W, "x": PF_I}
assert len(_FEATURES) == FEAT_COUNT     # a bit each, in this order
cdef dict _MODIFY = {"xchg": OP_XCHG, "add": OP_ADD, "and": OP_AND, "or": OP_OR, "xor": OP_XOR}


# Python's integers: shifts by 64 and more are not C's.
cdef object _WORD = 0xFFFFFFFFFFFFFFFF
cdef object _WIDE = int("F" * 32, 16)


cdef object _wide(const sc_result *r):
    cdef object high = r.value[1]
    return high << 64 | r.value[0]


cdef object _register(name, value):
    return check_int(name, value, 0, (1 << 64) - 1)


cdef u64 _address(object value) except? 0xFFFFFFFFFFFFFFFF:
    """A linear address. check_int has the last word, and the error; most are plain integers that fit."""
    if PyLong_CheckExact(value):
        try:
            return PyLong_AsUnsignedLongLong(value)
        except OverflowError:
            pass
    return check_int("gva", value, 0, (1 << 64) - 1)


cdef u64 _linear(const sc_vcpu *v, u64 va) except? 0xFFFFFFFFFFFFFFFF:
    """`va` as the processor takes it; #GP if it is not canonical."""
    if not linear_exists(v, va):
        raise GeneralProtection(0, va)
    return linear_address(v, va)


cdef u32 _size(object size) except 0:
    cdef int n = 0
    if PyLong_CheckExact(size):
        try:
            n = PyLong_AsLong(size)
        except OverflowError:
            pass
    elif size in (1, 2, 4, 8, 16):
        n = size
    if n == 1 or n == 2 or n == 4 or n == 8 or n == 16:
        return n
    raise ConfigError(f"size: {size!r} is not 1, 2, 4, 8 or 16")


cdef tuple _SHIFTS = ((12,), (21, 22), (30,))      # by class of sc_tlb.entry


cdef u32 _held(const sc_mmu *mmu, const sc_vcpu *own, u32 page) noexcept nogil:
    """Root slots that hold `page`, if the vcpu of that number has those of `own`."""
    cdef const sc_vcpu *v
    cdef u32 i, slot
    cdef u32 held = 0
    for i in range(mmu.n_vcpus):
        v = own if i == own.number else mmu.vcpus[i]
        for slot in range(4):
            held += v.roots[slot] == page
        for slot in range(mmu.prev_roots):
            held += v.prev[slot].page == page
    return held


cdef int _import_lagging(sc_mmu *mmu, sc_vcpu *c, dict state) except -1:
    """What only a vcpu of design `unsync` has; its roots are in place."""
    cdef list previous = []
    cdef object none = <u32>SC_NONE
    cdef u32 page
    cdef u32 i
    c.requests = check_int("requests", state.get("requests"), 0, 2 * REQUEST_ROOTS - 1)
    c.device_rights = check_int("device_rights", state.get("device_rights"), 0, ACC_W | ACC_U)
    if c.device_rights & ~<u32>(ACC_W | ACC_U):
        raise ConfigError(f"device_rights: {c.device_rights} is not 0, 2, 4 or 6")
    c.loaded, c.restarts, c.odd_stores, c.retried = [
        check_bool(name, state.get(name)) for name in ("loaded", "restarts", "odd_stores", "retried")]
    c.root_cr3, c.rip, c.retried_rip, c.retried_va, c.device_va, c.device_gfn, c.device_generation = [
        check_int(name, state.get(name), 0, _WORD)
        for name in ("root_cr3", "rip", "retried_rip", "retried_va", "device_va", "device_gfn", "device_generation")]
    if not isinstance(state.get("previous"), (list, tuple)) or len(state["previous"]) != mmu.prev_roots:
        raise ConfigError(f"previous: {mmu.prev_roots} pairs are needed, not {state.get('previous')!r:.60}")
    for pair in state["previous"]:
        pair = check_ints("previous", pair, 2, _WORD)
        previous.append((pair[0], check_int("previous", pair[1], 0, none)))
    for i in range(mmu.prev_roots):
        c.prev[i] = sc_prev(<u64>previous[i][0], <u32>previous[i][1], 0)
    for i in range(mmu.prev_roots):
        page = c.prev[i].page
        if page != SC_NONE and (page >= mmu.pool_pages or _held(mmu, c, page) > mmu.pages[page].root_count):
            raise ConfigError(f"previous: page {page} is not held as a root so often")
    if not c.loaded and not c.requests:
        raise ConfigError("loaded, requests: without roots there is a request for them")
    return 0


def tlb_sizes(tlb) -> list:
    """Bytes of each of VCpu.tlb_arrays, for a TLB of these settings (None: there are none)."""
    if tlb is None:
        return []
    header = sizeof(sc_tlb) - <size_t>&(<sc_tlb *>NULL).clock
    every = [*tlb_rows(tlb), *[row for row in (*tlb_caches(tlb), *tlb_host(tlb)) if row is not None]]
    return [header, *[max(1, row.entries) * (sizeof(sc_tlb_entry) + sizeof(u64)) for row in every]]


cdef class VCpu:
    """A virtual processor. Assigning a register is the instruction that loads it, with its exits and faults.

    Accesses: gva is a linear address (0 to 2**64 - 1; below 4- and 5-level paging its low 32 bits count), size is
    1, 2, 4, 8 or 16 bytes, user says in which mode (default: by cpl). implicit: the processor makes the access
    itself, to the IDT, GDT, LDT or TSS: as the supervisor whatever the mode is, and SMAP refuses it whatever AC is
    (SDM volume 3, 4.6.1). Guest faults raise PageFault, GeneralProtection or MMIOAccess.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> cpu.write(0x401000, 7)
    >>> cpu.cmpxchg(0x401000, 7, 8)
    True
    >>> cpu.read(0x401000)
    8
    """

    def __cinit__(self, Mmu mmu, features, tlb=None):
        mmu.idle()
        features = taken(Features, features, "features")
        if tlb is not None:
            tlb = check_tlb(tlb)
        if mmu.c.n_vcpus == SC_MAX_VCPUS:
            raise ConfigError(f"vcpus: at most {SC_MAX_VCPUS}")
        self.c = <sc_vcpu *>calloc(1, sizeof(sc_vcpu))
        if self.c == NULL:
            raise MemoryError
        self.mmu = mmu
        self.c.number = mmu.c.n_vcpus
        self.c.maxphyaddr = features.maxphyaddr
        for bit, name in enumerate(_FEATURES):
            if getattr(features, name):
                self.c.features |= <u32>1 << <int>bit
        self.c.guest.amd = features.vendor == "amd"
        if tlb is not None:
            self._make_tlb(tlb)
        else:
            self._memo = allocate(sizeof(sc_memo))
        self._take_fast_paths(mmu.is_fast())
        mmu._vcpus.append(self)
        mmu.c.vcpus[mmu.c.n_vcpus] = self.c
        mmu.c.n_vcpus += 1
        vcpu_init(mmu.c, self.c)

    def __dealloc__(self):
        free(self.c)

    def _take_fast_paths(self, on) -> None:
        """For `Mmu.general`: without a memo, or a TLB that is open, no fast path is. Nor is one where accesses are not
        repeated."""
        on = on and not self.c.restarts
        if self.c.tlb != NULL:
            self.c.tlb.open = on
        else:
            self.c.memo = <sc_memo *><size_t>self._memo.ctypes.data if on else NULL

    def export_state(self) -> dict:
        """Registers, roots and flood counter: with `tlb_arrays`, all that a vcpu is (VM.save). Design `unsync`: roots
        of earlier CR3s as [CR3, page], requests, and what else that design keeps."""
        cdef sc_vcpu *c = self.c
        self.mmu.still()
        state = {"cr0": c.cr0, "cr2": c.cr2, "cr3": c.cr3, "cr4": c.cr4, "efer": c.efer, "pkru": c.guest.pkru,
                 "ac": bool(c.guest.ac), "cpl": c.cpl, "pdptes": list(self.pdptes),
                 "roots": [c.roots[i] for i in range(4)], "flood_gfn": c.flood_gfn, "flood_count": c.flood_count}
        if self.mmu.c.lists_all:
            state |= {"requests": c.requests, "loaded": bool(c.loaded), "restarts": bool(c.restarts),
                      "odd_stores": bool(c.odd_stores), "retried": bool(c.retried), "root_cr3": c.root_cr3,
                      "rip": c.rip, "retried_rip": c.retried_rip,
                      "retried_va": c.retried_va, "device_va": c.device_va, "device_gfn": c.device_gfn,
                      "device_rights": c.device_rights, "device_generation": c.device_generation,
                      "previous": [[c.prev[i].cr3, c.prev[i].page] for i in range(self.mmu.c.prev_roots)]}
        return state

    def import_state(self, dict state) -> None:
        """Put back what export_state gave, without the side effects of register loads.

        ConfigError, and nothing changed, where a value is missing or is none that the register can have, where no loads
        lead to these registers, or where a root is not the page that they ask for, or no page that is held as a root.
        That the counts of roots agree is checked by the first call that uses the VM, as after Mmu.writable_arrays.
        """
        cdef sc_vcpu c = self.c[0]
        cdef u32 none = SC_NONE
        cdef u32 page
        cdef bint ac
        self.mmu.still()
        c.cr0, c.cr2, c.cr3, c.cr4, c.efer, c.flood_gfn = [
            check_int(name, state.get(name), 0, _WORD) for name in ("cr0", "cr2", "cr3", "cr4", "efer", "flood_gfn")]
        c.guest.pkru, c.flood_count = [
            check_int(name, state.get(name), 0, 0xFFFFFFFF) for name in ("pkru", "flood_count")]
        cpl = check_int("cpl", state.get("cpl"), 0, 3)
        if cpl not in (0, 3):
            raise ConfigError(f"cpl: {cpl} is not 0 or 3")
        c.cpl = cpl
        if not isinstance(state.get("ac"), bool):
            raise ConfigError(f"ac: a bool is needed, not {state.get('ac')!r:.60}")
        ac = state["ac"]
        c.guest.ac = ac
        for i, value in enumerate(check_ints("pdptes", state.get("pdptes"), 4, _WORD)):
            c.guest.pdpte[i] = value
        for i, value in enumerate(check_ints("roots", state.get("roots"), 4, none)):
            c.roots[i] = value
        if not registers_possible(&c):
            raise ConfigError(f"cr0, cr3, cr4, efer, pdptes: no loads lead to cr0={c.cr0:#x}, cr3={c.cr3:#x}, "
                              f"cr4={c.cr4:#x}, efer={c.efer:#x}, pdptes={state['pdptes']}")
        vcpu_apply(&c)
        if self.mmu.c.design.processor != NULL:
            self.mmu.c.design.processor(&c)
        if self.mmu.c.lists_all:
            _import_lagging(self.mmu.c, &c, state)
        c.hw.root = 0
        for i in range(4):
            page = c.roots[i]
            c.hw.pdpte[i] = 0
            if page == SC_NONE:
                continue
            if page >= self.mmu.c.pool_pages or not root_fits(self.mmu.c, &c, i, page):
                raise ConfigError(f"roots: page {page} is not the root that the registers ask for")
            if _held(self.mmu.c, &c, page) > self.mmu.c.pages[page].root_count:
                raise ConfigError(f"roots: page {page} is not held as a root so often")
            if c.requests == 0:
                c.hw.pdpte[i] = mem_pool_hpa(page) | PTE_P
                if i == 0 or not self.mmu.c.lists_all:
                    c.hw.root = mem_pool_hpa(page)
        c.guest.host_root = c.hw.root
        self.c[0] = c
        self._take_fast_paths(self.mmu.is_fast())
        self.mmu.c.mem.busy |= SC_WRITTEN

    @property
    def tlb_arrays(self) -> list:
        """State of the modelled TLB (uint8, sharing memory, read-only): its header from the clock on, then of each bank
        the entries and when each was used. No array without a TLB."""
        return [window(array) for array in self._tlb_parts()]

    def import_tlb(self, arrays) -> None:
        """Put back what tlb_arrays gave. ConfigError, and nothing changed, where that is no state of this TLB."""
        parts = self._tlb_parts()
        arrays = [np.asarray(array) for array in arrays]
        if [(a.dtype, a.shape) for a in arrays] != [(part.dtype, part.shape) for part in parts]:
            raise ConfigError(f"arrays: uint8 arrays of {[part.size for part in parts]} bytes are needed")
        before = [part.copy() for part in parts]
        for part, array in zip(parts, arrays, strict=True):
            part[:] = array
        if not self.tlb_is_sane():
            for part, array in zip(parts, before, strict=True):
                part[:] = array
            raise ConfigError("arrays: a TLB with sizes, addresses, rights and PCIDs that exist is needed")
        if self.c.tlb != NULL:
            tlb_index(self.c.tlb)

    def _tlb_parts(self):
        cdef sc_tlb *t = self.c.tlb
        self.mmu.still()
        if t == NULL:
            return []
        return [self._tlb[0][<size_t>&t.clock - <size_t>t:], *self._tlb[1:]]

    def tlb_is_sane(self) -> bool:
        """Every number in the TLB that is used as one (page size, address, rights, key, PCID, position, shadow page) is
        one that exists."""
        cdef sc_tlb *t = self.c.tlb
        cdef sc_tlb_entry *e
        cdef u64 i
        if t == NULL:
            return True
        for n in range(t.banks):
            shifts = [shift for size in range(TLB_SIZES) for shift in _SHIFTS[size] if t.bank[n].sizes >> <u32>size & 1]
            for i in range(<u64>t.bank[n].sets * t.bank[n].ways):
                e = &t.bank[n].entry[i]
                if e.page & 1 and (e.shift not in shifts or not is_canonical(e.page, 57)
                                   or e.gpa & ((<u64>1 << e.shift) - 1)
                                   or e.pcid > 4095 or e.access > ACC_ALL or e.pkey > 15
                                   or (e.root != SC_NONE and e.root >= self.mmu.c.pool_pages)):
                    return False
        for n in range(TLB_CACHES):
            for i in range(<u64>t.cache[n].sets * t.cache[n].ways):
                if t.cache[n].entry[i].pcid > 4095:
                    return False
        return t.due_next < TLB_PAGES

    def _make_tlb(self, tlb):
        """Of a TLB that was checked: see __cinit__."""
        cdef sc_tlb *t
        self._tlb, self._tags = [allocate(sizeof(sc_tlb))], []
        t = self.c.tlb = <sc_tlb *><size_t>self._tlb[0].ctypes.data
        t.epoch = 1                 # a zeroed entry is not valid
        for row in tlb_rows(tlb):
            self._make_bank(&t.bank[t.banks], row)
            t.banks += 1
        for i, row in enumerate(tlb_caches(tlb)):
            if row is not None:
                self._make_bank(&t.cache[<int>i], row)
                t.caching = True
        for i, row in enumerate(tlb_host(tlb)):
            if row is not None:
                self._make_bank(&t.host[<int>i] if i < TLB_CACHES else &t.nested, row)
                t.caching = True
        tlb_index(t)

    cdef _make_bank(self, sc_tlb_bank *b, row):
        cdef u64 entries = max(1, row.entries)
        array = allocate(entries * (sizeof(sc_tlb_entry) + sizeof(u64)))
        self._tlb.append(array)
        b.entry = <sc_tlb_entry *><size_t>array.ctypes.data
        b.used = <u64 *>(b.entry + entries)
        b.ways = row.ways
        b.sets = row.entries // row.ways if row.ways else 0
        array = allocate((entries + max(1, b.sets)) * sizeof(u64))
        self._tags.append(array)
        b.tag = <u64 *><size_t>array.ctypes.data
        b.full = b.tag + entries
        b.sizes, b.kinds, b.level, b.plru = row.sizes if row.ways else 0, row.kinds, row.level, row.plru

    @property
    def tlb(self):
        """Valid entries of the modelled TLB as a structured array (TLB_DTYPE); empty without one."""
        cdef sc_tlb *t = self.c.tlb
        cdef sc_tlb_entry *e
        cdef u64 i
        self.mmu.idle()
        rows = []
        if t != NULL:
            for n in range(t.banks):
                for i in range(<u64>t.bank[n].sets * t.bank[n].ways):
                    e = &t.bank[n].entry[i]
                    if tlb_valid(t, e, self.mmu.c.flush_epoch):
                        rows.append((e.page & ~<u64>1, e.gpa, 1 << e.shift, e.pcid, e.access, e.pkey, e.dirty,
                                     e.is_global, t.bank[n].level, n))
        return np.array(rows, dtype=TLB_DTYPE)

    @property
    def restarts(self) -> bool:
        """An access that had an exit which mended the shadow is not made: its outcome is RETRY (5), and the caller
        begins the instruction anew, from its fetch, as a processor does."""
        return self.c.restarts

    @restarts.setter
    def restarts(self, value):
        self.mmu.idle()
        self.c.restarts = check_bool("restarts", value)
        self._take_fast_paths(self.mmu.is_fast())

    @property
    def rip(self) -> int:
        """Address of the instruction that makes the accesses, for the one design that asks (`unsync`: a store that is
        run again natively is emulated the second time, at the same place)."""
        return self.c.rip

    @rip.setter
    def rip(self, value):
        self.mmu.idle()
        self.c.rip = _register("rip", value)

    @property
    def odd_stores(self) -> bool:
        """Stores are made by instructions that page tables are not written with (MOVNTQ, say). Design `unsync` takes
        one to a shadowed table as a sign that the frame is something else by now, and runs it again natively. Of the
        operations it knows ADD, XOR and stores of 16 bytes by itself."""
        return self.c.odd_stores

    @odd_stores.setter
    def odd_stores(self, value):
        self.mmu.idle()
        self.c.odd_stores = check_bool("odd_stores", value)

    @property
    def previous_roots(self) -> list:
        """(CR3, shadow page) of each root of an earlier CR3 that is kept, latest first; None for a free place."""
        return [None if self.c.prev[i].page == SC_NONE else (self.c.prev[i].cr3, self.c.prev[i].page)
                for i in range(self.mmu.c.prev_roots)]

    @property
    def number(self) -> int:
        """Index in vm.vcpus."""
        return self.c.number

    @property
    def mode(self) -> str:
        """Paging mode: "off", "32", "pae", "64" or "la57"."""
        return {0: "off", 2: "32", 3: "pae", 4: "64", 5: "la57"}[self.c.guest.mode]

    @property
    def cr0(self) -> int:
        """CR0; assignment checks it (#GP: SDM volume 3, 2.5), may change the paging mode, puts other roots in place.

        Reserved bits below bit 32 stay clear and ET stays set, whatever is assigned (volume 2, MOV to control
        registers).
        """
        return self.c.cr0

    @cr0.setter
    def cr0(self, value):
        self._loaded(load_cr0(self._idle().c, self.c, _register("cr0", value)))

    @property
    def cr2(self) -> int:
        """CR2: the address of the last page fault."""
        return self.c.cr2

    @cr2.setter
    def cr2(self, value):
        self.mmu.idle()
        self.c.cr2 = _register("cr2", value)

    @property
    def cr3(self) -> int:
        """CR3; assignment is a context switch. In PAE mode it loads the PDPTEs (#GP: SDM volume 3, 4.4.1).

        In long mode bits from MAXPHYADDR on are #GP, but for bit 63 with CR4.PCIDE; elsewhere only bits 31:0 are
        loaded, as the operand has 32. Bits that the mode ignores are kept and read back (tables 4-3, 4-7, 4-12).
        """
        return self.c.cr3

    @cr3.setter
    def cr3(self, value):
        self._loaded(load_cr3(self._idle().c, self.c, _register("cr3", value)))

    @property
    def cr4(self) -> int:
        """CR4; assignment checks it against the features (#GP: SDM volume 3, 2.5)."""
        return self.c.cr4

    @cr4.setter
    def cr4(self, value):
        self._loaded(load_cr4(self._idle().c, self.c, _register("cr4", value)))

    @property
    def efer(self) -> int:
        """EFER; LMA (bit 10) is read-only and follows LME and CR0.PG (SDM volume 3, 2.2.1)."""
        return self.c.efer

    @efer.setter
    def efer(self, value):
        self._loaded(load_efer(self._idle().c, self.c, _register("efer", value)))

    @property
    def pkru(self) -> int:
        """PKRU: for key k, bit 2k denies access, bit 2k + 1 denies writes (SDM volume 3, 4.6.2)."""
        return self.c.guest.pkru

    @pkru.setter
    def pkru(self, value):
        self.mmu.idle()
        load_pkru(self.mmu.c, self.c, check_int("pkru", value, 0, (1 << 32) - 1))

    @property
    def ac(self) -> bool:
        """EFLAGS.AC: supervisor accesses to user pages are allowed under SMAP (SDM volume 3, 4.6.1). It does not count
        for accesses with implicit=True."""
        return bool(self.c.guest.ac)

    @ac.setter
    def ac(self, value):
        self.mmu.idle()
        load_ac(self.mmu.c, self.c, bool(value))

    @property
    def cpl(self) -> int:
        """Privilege level, 0 or 3: that of accesses which do not say user=."""
        return self.c.cpl

    @cpl.setter
    def cpl(self, value):
        level = check_int("cpl", int(value) if isinstance(value, bool) else value, 0, 3)
        if level not in (0, 3):
            raise ConfigError(f"cpl: {value!r} is not 0 or 3")
        self.mmu.idle()
        self.c.cpl = level

    @property
    def pdptes(self) -> tuple:
        """The four PAE root entries as of the last load (SDM volume 3, 4.4.1)."""
        return tuple([self.c.guest.pdpte[i] for i in range(4)])

    cdef Mmu _idle(self):
        self.mmu.idle()
        return self.mmu

    def _loaded(self, int rc):
        exits_next(self.mmu.c)
        if rc == RC_GP:
            load_refused(self.mmu.c)
            raise GeneralProtection(0)
        if self.mmu.c.audit_found:
            raise self.mmu.failure(RC_AUDIT)

    cdef int _access(self, u32 op, object gva, object size, object user, object value, object expected,
                     sc_result *r) except -1:
        """Returns the size."""
        cdef sc_op o
        cdef int rc
        memset(&o, 0, sizeof(o))
        o.op = op
        o.size = _size(size)
        o.user = self.c.cpl == 3 if user is None else bool(user)
        o.addr = _address(gva)
        if op != OP_READ and op != OP_FETCH:
            value = check_int("value", value, 0, _WIDE if o.size == 16 else _WORD)
            o.value[0] = value & _WORD
            o.value[1] = value >> 64
        if op == OP_CMPXCHG:
            value = check_int("expected", expected, 0, _WIDE if o.size == 16 else _WORD)
            o.expected[0] = value & _WORD
            o.expected[1] = value >> 64
        self.mmu.idle()
        if user is _ITSELF:
            rc = access_implicit(self.mmu.c, self.c, &o, True, r)
        else:
            rc = access_do(self.mmu.c, self.c, &o, True, r)
        exits_next(self.mmu.c)
        if self.mmu.c.audit_found:
            rc = RC_AUDIT
        if rc == RC_OK:
            return o.size
        if rc == RC_PF:
            raise PageFault(self.c.cr2, r.error_code)
        if rc == RC_GP:
            raise GeneralProtection(0, o.addr)
        if rc == RC_MMIO:
            raise MMIOAccess(r.gpa)
        raise self.mmu.failure(rc)

    def read(self, gva, size=8, user=None, implicit=False) -> int:
        """Load `size` bytes, little endian."""
        cdef sc_result r
        if self._access(OP_READ, gva, size, _ITSELF if implicit else user, 0, 0, &r) < 16:
            return r.value[0]
        return _wide(&r)

    def write(self, gva, value, size=8, user=None, implicit=False) -> None:
        """Store the low `size` bytes of `value`."""
        cdef sc_result r
        self._access(OP_WRITE, gva, size, _ITSELF if implicit else user, value, 0, &r)

    def cmpxchg(self, gva, expected, value, size=8, user=None, implicit=False) -> bool:
        """LOCK CMPXCHG (8 and 16 bytes: CMPXCHG8B/16B): store `value` if `expected` is there; whether it was.

        As on hardware the page must be writable, and the destination is stored to, either way.
        """
        cdef sc_result r
        expected = check_int("expected", expected, 0, _WIDE)
        cdef u32 n = self._access(OP_CMPXCHG, gva, size, _ITSELF if implicit else user, value, expected, &r)
        return _wide(&r) == expected & (_WIDE >> (8 * (16 - n)))

    def modify(self, gva, operation, value, size=8, user=None, implicit=False) -> int:
        """A locked read-modify-write, `operation` "xchg", "add", "and", "or" or "xor"; returns what was there."""
        cdef sc_result r
        cdef object op = _MODIFY.get(operation)
        if op is None:
            raise ConfigError(f"operation: {operation!r} is not one of {', '.join(_MODIFY)}")
        if _size(size) == 16:
            raise ConfigError("size: 16 is not 1, 2, 4 or 8")
        self._access(op, gva, size, _ITSELF if implicit else user, value, 0, &r)
        return r.value[0]

    def fetch(self, gva, user=None) -> int:
        """Fetch an instruction byte: the gpa it comes from."""
        cdef sc_result r
        self._access(OP_FETCH, gva, 1, user, 0, 0, &r)
        return r.gpa

    def invlpg(self, gva) -> None:
        """INVLPG of the page at `gva` (SDM volume 3, 4.10.4.1)."""
        cdef sc_result r
        cdef sc_op o
        memset(&o, 0, sizeof(o))
        o.op = OP_INVLPG
        o.addr = _address(gva)
        self.mmu.idle()
        vcpu_op(self.mmu.c, self.c, &o, True, &r)
        exits_next(self.mmu.c)
        self.mmu._report()

    def invpcid(self, kind, pcid=0, gva=0) -> None:
        """INVPCID of type `kind`: 0 the page at `gva` under `pcid`, 1 all under `pcid`, but for global entries in both,
        2 all, 3 all that is not global. pcid, gva: the two words of its descriptor.

        UndefinedInstruction without the feature. GeneralProtection in user mode (cpl 3), for another type, for bits
        63:12 of `pcid`, for any PCID but 0 with types 0 and 1 while CR4.PCIDE is clear, and for type 0 with an address
        that is not canonical (SDM volume 2, INVPCID). A VM leaves its guest where INVLPG does, by the same reason.
        """
        cdef sc_result r
        cdef sc_op o
        memset(&o, 0, sizeof(o))
        o.op = OP_INVPCID
        o.size = min(_register("kind", kind), 255)
        o.user = self.c.cpl == 3
        o.value[0] = _register("pcid", pcid)
        o.addr = _address(gva)
        self.mmu.idle()
        cdef int rc = vcpu_op(self.mmu.c, self.c, &o, True, &r)
        exits_next(self.mmu.c)
        if rc == RC_UD:
            raise UndefinedInstruction
        if r.outcome == RC_GP:
            raise GeneralProtection(0)
        self.mmu._report()

    def init(self) -> None:
        """What an INIT leaves (SDM volume 3, table 10-1; EFER: APM volume 2, table 14-1): CR0 as it was in CD and NW,
        of the rest ET alone; CR2, CR3, CR4, EFER, EFLAGS.AC and the privilege level 0, PKRU as it was; no TLB entry.

        Memory stays, and so do the shadow pages; no exit is counted, as no instruction of this vcpu asks for it.
        """
        self.mmu.idle()
        load_init(self.mmu.c, self.c)
        self.mmu._report()

    def translate(self, gva, access=_READ, user=None):
        """Translation of `gva` by the guest's tables, for access "r", "w" or "x", with no side effect at all.

        Raises PageFault (CR2 stays as it is) or GeneralProtection where the access would fault. Tells nothing of
        whether RAM lies behind the gpa.
        """
        cdef Translation t = Translation.__new__(Translation)
        cdef u64 va = _address(gva)
        cdef u32 wanted = 0
        if access is not _READ:
            if access not in _ACCESS:
                raise ConfigError(f"access: {access!r} is not 'r', 'w' or 'x'")
            wanted = _ACCESS[access]
        self.mmu.idle()
        if self.c.cpl == 3 if user is None else user:
            wanted |= PF_U
        va = _linear(self.c, va)
        t.mode = self.c.guest.mode
        if probe_walk(self.mmu.c.mem, &self.c.guest, va, wanted, &t.w) == RC_PF:
            raise PageFault(va, t.w.error_code)
        return t

    def walk_levels(self, gva) -> list:
        """Entries that a walk of `gva` examines, as (level, gpa of the entry, entry) from the top, up to the one
        that ends it, whether by a translation or a fault.

        GeneralProtection for an address that is not canonical. With paging off, and for a PAE root entry, there is
        none."""
        cdef sc_walk w
        cdef u64 va = _address(gva)
        self.mmu.idle()
        va = _linear(self.c, va)
        if self.c.guest.mode == MODE_OFF:
            return []
        probe_walk(self.mmu.c.mem, &self.c.guest, va, 0, &w)
        return walk_levels(&w)

    def run(self, ops, data=True):
        """Perform the operations of a structured array (fields of OP_DTYPE by name, aligned or packed).

        More fields may be there. vcpu (u1): which processor performs it, else this one. implicit (u1): not 0 if the
        processor makes the access itself. value_high (u8): upper half of
        a 16-byte value. expected, expected_high (u8): what CMPXCHG compares with.

        data: move bytes. With False no value is read or stored, as for recorded addresses without their data.
        Returns RunResult. Ctrl-C raises Interrupted; what another signal's handler raises, MemoryError and other
        host-side errors come as they are; each with `.result` for the operations that were done. Signals are looked
        for at least every 0.1 seconds, between two operations. The GIL is released, `ops` cannot be resized meanwhile.

        ConfigError before anything is done, for an operation that cannot be; and with `.result`, at an operation that
        has become one since, as somebody (the guest, where `ops` lies in its memory) wrote to the array.
        """
        if type(ops) is not _ARRAY and isinstance(ops, _ARRAY):
            ops = np.asarray(ops)       # without what a subclass says of itself
        return run_batch(self.mmu, self.c.number, ops, data)

    def __repr__(self):
        return f"VCpu({self.c.number}, mode {self.mode}, cr3={self.c.cr3:#x})"


cdef sc_mmu *vm_mmu(object vm) except NULL:
    return (<Mmu?>vm.mmu).c


cdef sc_vcpu *vm_vcpu(object vm, u32 number) except NULL:
    cdef sc_mmu *mmu = vm_mmu(vm)
    if number >= mmu.n_vcpus:
        raise ConfigError(f"vcpu: there is no number {number}, the VM has {mmu.n_vcpus}")
    return mmu.vcpus[number]


cdef int shared_check(const sc_shared *theirs, u32 n) except -1:
    """ImportError, with both sizes, for the first structure that another module was compiled with and is not ours."""
    cdef sc_shared ours[SC_SHARED]
    cdef size_t size
    cdef u32 i
    shared_sizes(ours)
    for i in range(n):
        size = ours[i].size if i < SC_SHARED else 0
        if theirs[i].size != size:
            raise ImportError(
                f"{theirs[i].name.decode()}: {theirs[i].size} bytes in the module that asks, {size} in shadowcore "
                f"{__version__}, which runs: compile it with the headers of that"
            )
    return 0


# What modules find that were compiled when the inline functions of the header were these: no sizes are compared.
for _old, _new in (("mmu_struct", "vm_mmu"), ("vcpu_struct", "vm_vcpu")):
    globals()["__pyx_capi__"][_old] = globals()["__pyx_capi__"][_new]
del _old, _new
