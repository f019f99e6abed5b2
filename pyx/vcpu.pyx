"""The virtual processor: its registers, single accesses, translations without side effect, and batches."""
import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.string cimport memcpy, memset

from shadowcore.bits cimport is_canonical
from shadowcore.emulate cimport emulate_store
from shadowcore.events cimport EXIT_INVLPG, Stats, stats_copy, stats_since
from shadowcore.memory cimport mem_frame, mem_guest_frame, mem_mark_dirty, sc_no_frame
from shadowcore.mmu cimport Mmu, mmu_invlpg, mmu_resolve
from shadowcore.registers cimport load_ac, load_cr0, load_cr3, load_cr4, load_efer, load_pkru, vcpu_init
from shadowcore.state cimport (
    FEAT_FSGSBASE, FEAT_GBPAGES, FEAT_LA57, FEAT_NX, FEAT_PCID, FEAT_PKU, FEAT_PSE36, FEAT_SMAP, FEAT_SMEP,
    FEAT_UMIP, FEAT_XSAVE, FLUSH_INVLPG, SC_MAX_VCPUS, flush_lost, sc_mmu, sc_vcpu,
)
from shadowcore.tlb cimport TLB_SIZES, sc_tlb, sc_tlb_entry, tlb_flush_page, tlb_valid
from shadowcore.types cimport (
    ACC_U, ACC_W, ACC_X, MODE_32, MODE_64, MODE_LA57, MODE_OFF, PF_I, PF_U, PF_W, RC_BAD_OP, RC_EMULATE,
    RC_EXHAUSTED, RC_GP, RC_LIVELOCK, RC_MMIO, RC_OK, RC_PF, u8, u16, u32, u64,
)
from shadowcore.vcpu cimport sc_result
from shadowcore.walker cimport probe_walk, sc_walk

from shadowcore.config import Op, check_int
from shadowcore.errors import (
    ConfigError, EngineError, GeneralProtection, Interrupted, MMIOAccess, PageFault, PoolExhausted,
)
from shadowcore.memory import allocate
from shadowcore.results import RunResult

OP_DTYPE = np.dtype([("op", "u1"), ("user", "u1"), ("size", "u1"), ("addr", "<u8"), ("value", "<u8")])

TLB_DTYPE = np.dtype([
    ("page", "<u8"), ("gpa", "<u8"), ("page_size", "<u4"), ("pcid", "<u2"), ("access", "u1"), ("pkey", "u1"),
    ("dirty", "u1"), ("global_", "u1"),
])

cdef enum:
    OP_READ = 0
    OP_WRITE = 1
    OP_FETCH = 2
    OP_CR3 = 3
    OP_CR0 = 4
    OP_CR4 = 5
    OP_EFER = 6
    OP_INVLPG = 7
    OP_PKRU = 8
    OP_AC = 9
    OP_COUNT = 10
    CHUNK = 4096                    # operations between two looks for Ctrl-C


cdef inline u64 _nowhere() noexcept nogil:
    return <u64>-1


cdef inline void _store(sc_mmu *mmu, sc_vcpu *v, int rc, u64 gpa, const u8 *data, u32 nbytes, sc_result *r) noexcept nogil:
    """Do the store that was resolved to `gpa`; data NULL: the bytes that are there."""
    cdef u8 *at = mem_guest_frame(mmu.mem, gpa) + (gpa & 4095)
    cdef u8 same[16]
    if rc == RC_EMULATE:
        if data == NULL:
            memcpy(same, at, nbytes)
            data = same
        emulate_store(mmu, v, gpa, data, nbytes)
        r.emulated += 1
        return
    if data != NULL:
        memcpy(at, data, nbytes)
    if mmu.mem.log_stores:
        mem_mark_dirty(mmu.mem, gpa >> 12)


cdef int _access_crossing(sc_mmu *mmu, sc_vcpu *v, u64 va, u64 second_va, u32 access, u32 size, u64 value, bint data,
                          sc_result *r) noexcept nogil:
    """An access over a page boundary: both pages are resolved before a byte moves."""
    cdef sc_walk w
    cdef u64 second
    cdef u32 head = 4096 - <u32>(va & 4095)
    cdef int rc = mmu_resolve(mmu, v, va, access, &w)
    r.error_code = w.error_code
    r.gpa = w.gpa
    if rc != RC_OK and rc != RC_EMULATE:
        return rc
    rc = mmu_resolve(mmu, v, second_va, access, &w)
    r.error_code = w.error_code
    second = w.gpa
    if rc != RC_OK and rc != RC_EMULATE:
        r.gpa = second
        return rc
    if access & PF_W:
        # Resolving the second page may have turned the first one's frame into a shadowed table: look again.
        _store(mmu, v, _store_kind(mmu, r.gpa), r.gpa, <u8 *>&value if data else NULL, head, r)
        _store(mmu, v, _store_kind(mmu, second), second, <u8 *>&value + head if data else NULL, size - head, r)
    elif data:
        memcpy(&r.value, mem_guest_frame(mmu.mem, r.gpa) + (r.gpa & 4095), head)
        memcpy(<u8 *>&r.value + head, mem_guest_frame(mmu.mem, second), size - head)
    return RC_OK


cdef inline int _store_kind(const sc_mmu *mmu, u64 gpa) noexcept nogil:
    if mmu.shadow and mmu.frames[mem_frame(mmu.mem, gpa >> 12)].shadowed:
        return RC_EMULATE
    return RC_OK


cdef int vcpu_access(sc_mmu *mmu, sc_vcpu *v, u32 op, u64 va, bint user, u32 size, u64 value, bint data,
                     sc_result *r) noexcept nogil:
    """One load, store or fetch of `size` bytes at `va`. data False: no bytes move, but a store to a guest table is
    emulated with the bytes that are there. RC_* as in r.outcome, or negative for a host-side error."""
    cdef sc_walk w
    cdef u64 second_va
    cdef u32 access = (PF_U if user else 0) | (PF_W if op == OP_WRITE else PF_I if op == OP_FETCH else 0)
    cdef u64 taken = mmu.stats.pf_taken
    cdef int rc, width
    r.gpa = _nowhere()
    r.value = 0
    r.error_code = 0
    r.emulated = 0
    if op == OP_FETCH:
        size = 1
    second_va = va + (size - 1)
    if v.guest.mode >= MODE_64:
        width = 57 if v.guest.mode == MODE_LA57 else 48
        if not is_canonical(va, width) or not is_canonical(second_va, width) or second_va < va:
            r.exits = 0
            r.outcome = RC_GP
            mmu.stats.gp_guest += 1
            return RC_GP
    else:
        va &= 0xFFFFFFFFULL
        second_va &= 0xFFFFFFFFULL
    if (va & 4095) + size > 4096:
        rc = _access_crossing(mmu, v, va, second_va & ~<u64>4095, access, size, value, data, r)
    else:
        rc = mmu_resolve(mmu, v, va, access, &w)
        r.gpa = w.gpa
        r.error_code = w.error_code
        if rc == RC_OK or rc == RC_EMULATE:
            if op == OP_WRITE:
                _store(mmu, v, rc, w.gpa, <u8 *>&value if data else NULL, size, r)
            elif data:
                memcpy(&r.value, mem_guest_frame(mmu.mem, w.gpa) + (w.gpa & 4095), size)
    r.exits = <u32>(mmu.stats.pf_taken - taken)
    if rc == RC_PF:
        r.gpa = _nowhere()
    else:
        r.error_code = 0
    if rc == RC_EMULATE:
        rc = RC_OK
    r.outcome = <u8>rc
    return rc


cdef int vcpu_op(sc_mmu *mmu, sc_vcpu *v, u32 op, bint user, u32 size, u64 addr, u64 value, bint data,
                 sc_result *r) noexcept nogil:
    """One operation of a batch; see vcpu_access."""
    cdef int rc = RC_OK
    if op <= OP_FETCH:
        return vcpu_access(mmu, v, op, addr, user, size, value, data, r)
    memset(r, 0, sizeof(sc_result))
    r.gpa = _nowhere()
    if op == OP_CR3:
        rc = load_cr3(mmu, v, value)
    elif op == OP_CR0:
        rc = load_cr0(mmu, v, value)
    elif op == OP_CR4:
        rc = load_cr4(mmu, v, value)
    elif op == OP_EFER:
        rc = load_efer(mmu, v, value)
    elif op == OP_INVLPG:
        mmu.stats.invlpg += 1
        if v.tlb != NULL:
            tlb_flush_page(v.tlb, addr, flush_lost(mmu, FLUSH_INVLPG))
        if mmu.shadow and not mmu.keep:
            mmu.stats.exits[EXIT_INVLPG] += 1
            mmu_invlpg(mmu, v, addr)
    elif op == OP_PKRU:
        load_pkru(v, value)
    elif op == OP_AC:
        load_ac(v, value & 1)
    else:
        return RC_BAD_OP
    if rc == RC_GP:
        mmu.stats.gp_guest += 1
    r.outcome = <u8>rc
    return rc


cdef class Translation:
    """Where a linear address leads now, found without any side effect.

    gpa; page_size (bytes); writable, user, executable: rights of the whole walk; entry: the guest's leaf entry;
    level: its level; levels: (level, gpa of the entry, entry) from the top. With paging off there are no entries.
    """

    @property
    def gpa(self) -> int:
        return self.w.gpa

    @property
    def page_size(self) -> int:
        if self.mode == MODE_OFF:
            return 4096
        if self.mode == MODE_32:
            return 4096 if self.w.level == 1 else 4 << 20
        return 1 << (12 + 9 * (self.w.level - 1))

    @property
    def writable(self) -> bool:
        return self.w.access & ACC_W != 0

    @property
    def user(self) -> bool:
        return self.w.access & ACC_U != 0

    @property
    def executable(self) -> bool:
        return self.w.access & ACC_X != 0

    @property
    def entry(self) -> int:
        return 0 if self.mode == MODE_OFF else self.w.entry[self.w.level]

    @property
    def level(self) -> int:
        return 0 if self.mode == MODE_OFF else self.w.level

    @property
    def levels(self) -> list:
        return [] if self.mode == MODE_OFF else _levels(&self.w, self.mode)

    def __repr__(self):
        rights = "r" + "-w"[self.writable] + "-x"[self.executable] + "-u"[self.user]
        return f"Translation(gpa={self.gpa:#x}, page_size={self.page_size}, rights={rights})"


cdef list _levels(const sc_walk *w, int mode):
    cdef int level = w.top
    cdef list found = []
    while level >= w.level and level > 0:
        found.append((level, (w.table[level] << 12) + _offset(w, level, mode), w.entry[level]))
        level -= 1
    return found


cdef inline u64 _offset(const sc_walk *w, int level, int mode) noexcept:
    return w.index[level] * (4 if mode == MODE_32 else 8)


cdef dict _ACCESS = {"r": 0, "w": PF_W, "x": PF_I}


cdef object _register(name, value):
    return check_int(name, value, 0, (1 << 64) - 1)


cdef class VCpu:
    """A virtual processor. Assigning a register is the instruction that loads it, with its exits and faults.

    Accesses: gva is a linear address (0 to 2**64 - 1; below 4- and 5-level paging its low 32 bits count), size is
    1, 2, 4 or 8 bytes, user says in which mode (default: by cpl). Guest faults raise PageFault, GeneralProtection
    or MMIOAccess.
    """

    def __cinit__(self, Mmu mmu, features, tlb=None):
        if mmu.c.n_vcpus == SC_MAX_VCPUS:
            raise ConfigError(f"vcpus: at most {SC_MAX_VCPUS}")
        memset(&self.c, 0, sizeof(self.c))
        self.mmu = mmu
        self.c.number = mmu.c.n_vcpus
        self.c.maxphyaddr = features.maxphyaddr
        for name, bit in (("nx", FEAT_NX), ("gbpages", FEAT_GBPAGES), ("la57", FEAT_LA57), ("pse36", FEAT_PSE36),
                          ("smep", FEAT_SMEP), ("smap", FEAT_SMAP), ("pku", FEAT_PKU), ("pcid", FEAT_PCID),
                          ("umip", FEAT_UMIP), ("fsgsbase", FEAT_FSGSBASE), ("xsave", FEAT_XSAVE)):
            if getattr(features, name):
                self.c.features |= bit
        if tlb is not None:
            self._make_tlb(tlb)
        mmu.c.vcpus[mmu.c.n_vcpus] = &self.c
        mmu.c.n_vcpus += 1
        vcpu_init(&mmu.c, &self.c)

    def _make_tlb(self, tlb):
        cdef u32 entries, ways
        self._tlb = [allocate(sizeof(sc_tlb))]
        self.c.tlb = <sc_tlb *><size_t>self._tlb[0].ctypes.data
        self.c.tlb.epoch = 1        # a zeroed entry is not valid
        for i, (entries, ways) in enumerate(tlb.geometry):
            array = allocate(max(1, entries) * sizeof(sc_tlb_entry))
            self._tlb.append(array)
            self.c.tlb.entry[i] = <sc_tlb_entry *><size_t>array.ctypes.data
            self.c.tlb.ways[i] = ways
            self.c.tlb.sets[i] = entries // ways if ways else 0

    @property
    def tlb(self):
        """Valid entries of the modelled TLB as a structured array (TLB_DTYPE); empty without one."""
        cdef sc_tlb *t = self.c.tlb
        cdef sc_tlb_entry *e
        cdef u64 i
        self.mmu.idle()
        rows = []
        if t != NULL:
            for size in range(TLB_SIZES):
                for i in range(<u64>t.sets[size] * t.ways[size]):
                    e = &t.entry[size][i]
                    if tlb_valid(t, e, self.mmu.c.flush_epoch):
                        rows.append((e.page & ~<u64>1, e.gpa, 1 << e.shift, e.pcid, e.access, e.pkey, e.dirty,
                                     e.is_global))
        return np.array(rows, dtype=TLB_DTYPE)

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
        """CR0; assignment checks it (#GP), may change the paging mode and puts other roots in place."""
        return self.c.cr0

    @cr0.setter
    def cr0(self, value):
        self._loaded(load_cr0(&self._idle().c, &self.c, _register("cr0", value)))

    @property
    def cr2(self) -> int:
        """CR2: the address of the last page fault."""
        return self.c.cr2

    @cr2.setter
    def cr2(self, value):
        self.c.cr2 = _register("cr2", value)

    @property
    def cr3(self) -> int:
        """CR3; assignment is a context switch."""
        return self.c.cr3

    @cr3.setter
    def cr3(self, value):
        self._loaded(load_cr3(&self._idle().c, &self.c, _register("cr3", value)))

    @property
    def cr4(self) -> int:
        """CR4; assignment checks it against the features (#GP)."""
        return self.c.cr4

    @cr4.setter
    def cr4(self, value):
        self._loaded(load_cr4(&self._idle().c, &self.c, _register("cr4", value)))

    @property
    def efer(self) -> int:
        """EFER; LMA (bit 10) is read-only and follows LME and CR0.PG."""
        return self.c.efer

    @efer.setter
    def efer(self, value):
        self._loaded(load_efer(&self._idle().c, &self.c, _register("efer", value)))

    @property
    def pkru(self) -> int:
        """PKRU: for key k, bit 2k denies access, bit 2k + 1 denies writes."""
        return self.c.guest.pkru

    @pkru.setter
    def pkru(self, value):
        load_pkru(&self.c, check_int("pkru", value, 0, (1 << 32) - 1))

    @property
    def ac(self) -> bool:
        """EFLAGS.AC: supervisor accesses to user pages are allowed under SMAP."""
        return bool(self.c.guest.ac)

    @ac.setter
    def ac(self, value):
        load_ac(&self.c, bool(value))

    @property
    def cpl(self) -> int:
        """Privilege level, 0 or 3: that of accesses which do not say user=."""
        return self.c.cpl

    @cpl.setter
    def cpl(self, value):
        if value not in (0, 3):
            raise ConfigError(f"cpl: {value!r} is not 0 or 3")
        self.c.cpl = value

    @property
    def pdptes(self) -> tuple:
        """The four PAE root entries as of the last load."""
        return tuple([self.c.guest.pdpte[i] for i in range(4)])

    cdef Mmu _idle(self):
        self.mmu.idle()
        return self.mmu

    def _loaded(self, int rc):
        if rc == RC_GP:
            self.mmu.counters.gp_guest += 1
            raise GeneralProtection(0)

    cdef int _access(self, u32 op, object gva, object size, object user, u64 value, sc_result *r) except -1:
        cdef u64 va = check_int("gva", gva, 0, (1 << 64) - 1)
        cdef int rc
        if size not in (1, 2, 4, 8):
            raise ConfigError(f"size: {size!r} is not 1, 2, 4 or 8")
        self.mmu.idle()
        rc = vcpu_access(&self.mmu.c, &self.c, op, va, self.c.cpl == 3 if user is None else user, size, value, True, r)
        if rc == RC_OK:
            return 0
        if rc == RC_PF:
            raise PageFault(self.c.cr2, r.error_code)
        if rc == RC_GP:
            raise GeneralProtection(0)
        if rc == RC_MMIO:
            raise MMIOAccess(r.gpa)
        raise host_error(self.mmu, rc)

    def read(self, gva, size=8, user=None) -> int:
        """Load `size` bytes, little endian."""
        cdef sc_result r
        self._access(OP_READ, gva, size, user, 0, &r)
        return r.value

    def write(self, gva, value, size=8, user=None) -> None:
        """Store the low `size` bytes of `value`."""
        cdef sc_result r
        cdef u64 v = check_int("value", value, 0, (1 << 64) - 1)
        self._access(OP_WRITE, gva, size, user, v, &r)

    def fetch(self, gva, user=None) -> int:
        """Fetch an instruction byte: the gpa it comes from."""
        cdef sc_result r
        self._access(OP_FETCH, gva, 1, user, 0, &r)
        return r.gpa

    def invlpg(self, gva) -> None:
        """INVLPG of the page at `gva`."""
        cdef sc_result r
        self.mmu.idle()
        vcpu_op(&self.mmu.c, &self.c, OP_INVLPG, False, 0, check_int("gva", gva, 0, (1 << 64) - 1), 0, True, &r)

    def translate(self, gva, access="r", user=None):
        """Translation of `gva` by the guest's tables, for access "r", "w" or "x", with no side effect at all.

        Raises PageFault (CR2 stays as it is) or GeneralProtection where the access would fault. Tells nothing of
        whether RAM lies behind the gpa.
        """
        cdef Translation t = Translation.__new__(Translation)
        cdef u64 va = check_int("gva", gva, 0, (1 << 64) - 1)
        cdef object wanted = _ACCESS.get(access)
        if wanted is None:
            raise ConfigError(f"access: {access!r} is not 'r', 'w' or 'x'")
        self.mmu.idle()
        self._walk(va, wanted, user, t)
        return t

    cdef int _walk(self, u64 va, u32 access, object user, Translation t) except -1:
        if self.c.cpl == 3 if user is None else user:
            access |= PF_U
        if self.c.guest.mode >= MODE_64:
            if not is_canonical(va, 57 if self.c.guest.mode == MODE_LA57 else 48):
                raise GeneralProtection(0)
        else:
            va &= 0xFFFFFFFFULL
        t.mode = self.c.guest.mode
        if probe_walk(self.mmu.c.mem, &self.c.guest, va, access, &t.w) == RC_PF:
            raise PageFault(va, t.w.error_code)
        return 0

    def walk_levels(self, gva) -> list:
        """Entries that a walk of `gva` examines, as (level, gpa of the entry, entry) from the top, up to the one
        that ends it, whether by a translation or a fault."""
        cdef sc_walk w
        cdef u64 va = check_int("gva", gva, 0, (1 << 64) - 1)
        self.mmu.idle()
        if self.c.guest.mode == MODE_OFF:
            return []
        probe_walk(self.mmu.c.mem, &self.c.guest, va, 0, &w)
        return _levels(&w, self.c.guest.mode)

    def run(self, ops, data=True):
        """Perform the operations of a structured array (fields of OP_DTYPE by name, aligned or packed).

        data: move bytes. With False no value is read or stored, as for recorded addresses without their data.
        Returns RunResult. Ctrl-C raises Interrupted, and a host-side error its own exception, with `.result` for
        the operations that were done. The GIL is released.
        """
        cdef const u8 *base
        cdef u64 n = 0
        cdef u64 stride = 0
        cdef u64 at[5]
        ops = np.asanyarray(ops) if isinstance(ops, np.ndarray) else ops
        _check_ops(ops)
        n = ops.shape[0]
        stride = ops.strides[0] if n else 0
        for i, name in enumerate(("op", "user", "size", "addr", "value")):
            at[i] = ops.dtype.fields[name][1]
        base = <const u8 *><size_t>ops.ctypes.data
        _check_values(base, n, stride, at)
        outcome = np.zeros(n, dtype=np.uint8)
        error_code = np.zeros(n, dtype=np.uint16)
        gpa = np.full(n, _nowhere(), dtype=np.uint64)
        value = np.zeros(n, dtype=np.uint64)
        exits = np.zeros(n, dtype=np.uint16)
        emulated = np.zeros(n, dtype=np.uint8)
        cdef u8[::1] c_outcome = outcome
        cdef u16[::1] c_error = error_code
        cdef u64[::1] c_gpa = gpa
        cdef u64[::1] c_value = value
        cdef u16[::1] c_exits = exits
        cdef u8[::1] c_emulated = emulated
        cdef sc_mmu *mmu = &self.mmu.c
        cdef sc_vcpu *v = &self.c
        cdef sc_result r
        cdef u64 i_op = 0
        cdef u64 stop
        cdef u64 word[2]
        cdef const u8 *op
        cdef int rc = 0
        cdef bint move = data
        cdef Stats before = stats_copy(mmu.stats)
        self.mmu.idle()
        self.mmu.busy = True
        error = None
        try:
            while i_op < n and rc >= 0:
                stop = min(n, i_op + CHUNK)
                with nogil:
                    while i_op < stop:
                        op = base + i_op * stride
                        memcpy(&word[0], op + at[3], 8)
                        memcpy(&word[1], op + at[4], 8)
                        rc = vcpu_op(mmu, v, op[at[0]], op[at[1]] != 0, op[at[2]], word[0], word[1], move, &r)
                        if rc < 0:
                            break
                        c_outcome[i_op] = r.outcome
                        c_error[i_op] = <u16>r.error_code
                        c_gpa[i_op] = r.gpa
                        c_value[i_op] = r.value
                        c_exits[i_op] = <u16>r.exits
                        c_emulated[i_op] = r.emulated
                        i_op += 1
                PyErr_CheckSignals()
        except KeyboardInterrupt:
            error = Interrupted(None)
        finally:
            self.mmu.busy = False
        done = i_op
        result = RunResult(outcome[:done], error_code[:done], gpa[:done], value[:done], exits[:done], emulated[:done],
                           stats_since(mmu.stats, before))
        if rc < 0:
            error = host_error(self.mmu, rc)
        if error is not None:
            error.result = result
            raise error
        return result

    def __repr__(self):
        return f"VCpu({self.c.number}, mode {self.mode}, cr3={self.c.cr3:#x})"


cdef object host_error(Mmu mmu, int rc):
    """The exception for a negative return code."""
    if rc == RC_EXHAUSTED:
        pages = mmu.pages
        roots = pages["gfn"][pages["root_count"] > 0]
        return PoolExhausted(len(roots) + 4, mmu.c.pool_pages, tuple(int(gfn) for gfn in roots))
    if rc == RC_LIVELOCK:
        return EngineError("an access does not complete: the shadow and the guest's tables disagree for good")
    return EngineError(f"internal error {rc}")


cdef int _check_ops(object ops) except -1:
    """ConfigError unless `ops` is a one-dimensional structured array with the fields of OP_DTYPE."""
    if not isinstance(ops, np.ndarray) or ops.dtype.names is None:
        raise ConfigError(f"ops: a structured array with the fields of OP_DTYPE is needed, not {ops!r:.60}")
    if ops.ndim != 1:
        raise ConfigError(f"ops: one dimension is needed, not {ops.ndim}")
    for name in OP_DTYPE.names:
        if name not in ops.dtype.names:
            raise ConfigError(f"ops: field {name!r} is missing")
        if ops.dtype.fields[name][0] != OP_DTYPE.fields[name][0]:
            raise ConfigError(f"ops: field {name!r} is {ops.dtype.fields[name][0]}, {OP_DTYPE.fields[name][0]} is needed")
    return 0


cdef int _check_values(const u8 *base, u64 n, u64 stride, const u64 *at) except -1:
    """ConfigError if an operation code or a size does not exist; before anything is run."""
    cdef u64 i
    cdef u8 op, size
    cdef const u8 *where
    cdef bint bad = False
    with nogil:
        for i in range(n):
            where = base + i * stride
            op = where[at[0]]
            size = where[at[2]]
            if op >= OP_COUNT or (op < OP_FETCH and (size == 0 or size > 8 or size & (size - 1))):
                bad = True
                break
    if bad:
        if op >= OP_COUNT:
            raise ConfigError(f"ops[{i}]: operation code {op} is not one of {', '.join(f'{o.name}={o.value}' for o in Op)}")
        raise ConfigError(f"ops[{i}]: size {size} is not 1, 2, 4 or 8")
    return 0
