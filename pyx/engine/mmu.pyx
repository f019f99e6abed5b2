"""The MMU of a VM as Python sees it: its design, counters and shadow structure; and what is published of it.

Past 500 lines, for it is one class, which forwards, and owns what the engine works on.
"""
import os

import numpy as np

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from shadowcore.engine.backing cimport host_collapse, host_touch, host_unmap, sc_backing
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.counters cimport Stats, sc_stats
from shadowcore.engine.design cimport design_invlpg, design_new_cr3, design_reset
from shadowcore.engine.designs.adaptive cimport adaptive_design
from shadowcore.engine.designs.agile cimport agile_design
from shadowcore.engine.designs.cached cimport cached_design
from shadowcore.engine.designs.flush cimport flush_design
from shadowcore.engine.designs.native cimport native_design
from shadowcore.engine.designs.nested cimport nested_design
from shadowcore.engine.designs.unsync cimport unsync_design
from shadowcore.engine.emulate cimport device_store
from shadowcore.engine.exits cimport exits_close, exits_follow, exits_leave, exits_taken
from shadowcore.engine.flushes cimport FLUSH_COUNT, FLUSH_HOST, FLUSH_SLOTS, request_flush, request_flush_of
from shadowcore.engine.history cimport HISTORY_GROUP, history_find, sc_histories, sc_history
from shadowcore.engine.hooks cimport EVENT_COUNT, HOOK_RAISED, POINT_COUNT
from shadowcore.engine.invariants cimport audit_violations, mmu_settle, sc_audit
from shadowcore.engine.memory cimport (
    SC_RUNNING, SC_WRITTEN, Memory, mem_frame, mem_guest_frame, mem_is_rom, mem_touch, sc_no_frame, sc_slot,
)
from shadowcore.engine.neighbours cimport neighbours_follow
from shadowcore.engine.nested.tables cimport host_tables_of_walk
from shadowcore.engine.page cimport sc_frame, sc_link, sc_page
from shadowcore.engine.policies.arc cimport arc_policy
from shadowcore.engine.policies.clock cimport clock_policy
from shadowcore.engine.policies.cost cimport cost_policy
from shadowcore.engine.policies.fifo cimport fifo_policy
from shadowcore.engine.policies.lirs cimport lirs_policy
from shadowcore.engine.policies.lru cimport lru_policy
from shadowcore.engine.policies.optimal cimport optimal_policy
from shadowcore.engine.policies.plugged cimport Plugged, PluggedDecisions, plug_decisions, plug_policy
from shadowcore.engine.policies.queues cimport queues_init, sc_member, sc_queues
from shadowcore.engine.policies.random cimport random_policy
from shadowcore.engine.policies.recorder cimport recorder_policy, references_free
from shadowcore.engine.policies.s3fifo cimport s3fifo_policy
from shadowcore.engine.policies.sieve cimport sieve_policy
from shadowcore.engine.policies.twoq cimport twoq_policy
from shadowcore.engine.policies.uses cimport uses_follow
from shadowcore.engine.pool cimport hash_bucket, pool_init, pool_recycles, shadows
from shadowcore.engine.quirks cimport QUIRK_COUNT, QUIRK_ROOT_EMPTIED
from shadowcore.engine.record cimport RECORD_COUNT
from shadowcore.engine.recorded cimport kept_grow, kept_new
from shadowcore.engine.resolve cimport resolve
from shadowcore.engine.rmap cimport list_first, list_next
from shadowcore.engine.role cimport (
    ROLE_DIRECT, ROLE_GLEVELS, ROLE_GLOBAL, ROLE_HOST, ROLE_NESTED, ROLE_NXE, ROLE_PKEY, ROLE_PSE, ROLE_QUADRANT,
    ROLE_WP0, role_access, role_field, role_level,
)
from shadowcore.engine.roots cimport root_slots
from shadowcore.engine.state cimport (
    CHANGES, SLOT_ADDED, SLOT_MOVED, SLOT_REMOVED, memo_drop, sc_event, sc_exit, sc_mmu, sc_reference,
    sc_reference_hook, sc_vcpu,
)
from shadowcore.engine.types cimport (
    u16,
    MODE_64, RC_AUDIT, RC_EXHAUSTED, RC_HOOK, RC_LIVELOCK, RC_OK, RC_UNGRANTED, RC_UNHANDLED, SC_NONE, u8, u32, u64,
)
from shadowcore.engine.walker cimport sc_walk
from shadowcore.engine.watch cimport watch_due, watch_look, watch_raised
from shadowcore.engine.zap cimport count_no_large, generation_next

from shadowcore.config import (
    HOST_PAGES, MARKERS as _MARKERS, RULES as _RULES, USES as _USES, WAYS_BACK as _WAYS_BACK, Native, Nested, Shadow,
    check_bool, check_int, check_ints, design as checked_design,
)
from shadowcore.engine.costs import find as find_costs
from shadowcore.engine.explained import TableHistory
from shadowcore.engine.future import Future
from shadowcore.engine.memory import allocate, window
from shadowcore.errors import AuditError, ConfigError, EngineError, PoolExhausted
from shadowcore.plugins import Decisions, Policy, made as plugin

ctypedef void (*sc_maker)(sc_mmu *mmu) noexcept nogil

# A design is a file in engine/designs and a line here, a policy a file in engine/policies and a line; config has their
# settings.
cdef dict _DESIGNS = {
    "native": <size_t>native_design,
    "nested": <size_t>nested_design,
    "flush": <size_t>flush_design,
    "cached": <size_t>cached_design,
    "unsync": <size_t>unsync_design,
    "agile": <size_t>agile_design,
    "adaptive": <size_t>adaptive_design,
}
cdef dict _POLICIES = {
    "fifo": <size_t>fifo_policy,
    "lru": <size_t>lru_policy,
    "clock": <size_t>clock_policy,
    "2q": <size_t>twoq_policy,
    "arc": <size_t>arc_policy,
    "lirs": <size_t>lirs_policy,
    "sieve": <size_t>sieve_policy,
    "s3-fifo": <size_t>s3fifo_policy,
    "random": <size_t>random_policy,
    "cost": <size_t>cost_policy,
    "optimal": <size_t>optimal_policy,
}


cdef int mmu_resolve(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """The published name of resolve.resolve, as those that follow are of what they call."""
    return resolve(mmu, v, va, access, w)


cdef void mmu_new_cr3(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """CR3 was loaded with paging on."""
    design_new_cr3(mmu, v, NULL)


cdef void mmu_reset(sc_mmu *mmu, sc_vcpu *v) noexcept nogil:
    """CR0, CR4 or EFER was loaded: another mode, or the same mode by other rules."""
    design_reset(mmu, v, NULL)


cdef void mmu_invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """INVLPG, as far as the MMU is asked."""
    design_invlpg(mmu, v, va)


cdef void mmu_protect_slot(sc_mmu *mmu, int slot) noexcept nogil:
    mmu.design.protect_slot(mmu, slot)


cdef void _host_withdrawn(void *context, u64 frame, u64 n) noexcept nogil:
    """The host takes n frames of RAM away: what of them is in memory slots nobody reaches any more."""
    cdef sc_mmu *mmu = <sc_mmu *>context
    cdef sc_slot *slot
    cdef int i
    cdef u64 concerned = 0
    cdef u64 gfn = 0
    cdef u64 first = 0
    cdef u64 last = 0
    for i in range(mmu.mem.nslots):
        slot = &mmu.mem.slots[i]
        if slot.npages and slot.frame < frame + n and frame < slot.frame + slot.npages:
            concerned += 1
            first = max(frame, slot.frame)
            last = min(frame + n, slot.frame + slot.npages)
            gfn = slot.base_gfn + (first - slot.frame)
    if concerned == 0:
        return
    mmu.mem.host.changes += concerned
    mmu.stats.host_unmaps += 1
    memo_drop(mmu)
    if mmu.design.withdraw == NULL or mmu.design.withdraw(mmu, frame, n):
        # Of frames of several slots, nobody is told where they are mapped.
        request_flush_of(mmu, FLUSH_HOST, gfn if concerned == 1 else 0, last - first if concerned == 1 else 0)


_COUNTS = ("n_free", "n_active", "n_pte4", "n_pte8")
_LISTS = ("free_head", "young", "old")
_RULE = {"nested_clock": 0xFFFFFFFFFFFFFFFF, "nested_since": 0xFFFFFFFFFFFFFFFF, "nested_number": 0xFFFFFF}
cdef object _WORD = 0xFFFFFFFFFFFFFFFF
_SHIFT = <int>((<size_t>&(<sc_queues *>NULL).shift) // 4)      # its place among the words of the books
FLUSHES = ("protect", "zap", "zap_upper", "store", "withheld", "leaf", "link", "log", "cr3", "context", "invlpg",
           "fault", "slots", "host")
assert len(FLUSHES) == FLUSH_COUNT
# A bit each, in fields of sc_mmu.
sc_check(FLUSH_COUNT <= 8 * sizeof((<sc_mmu *>NULL).lost_flushes))
sc_check(QUIRK_COUNT <= 8 * sizeof((<sc_mmu *>NULL).quirks))
sc_check(POINT_COUNT <= 8 * sizeof((<sc_mmu *>NULL).audit_points))
sc_check(EVENT_COUNT <= 8 * sizeof((<sc_mmu *>NULL).events))


cdef int _ask_can_emulate(void *hook, u64 gva, u64 gpa, u32 nbytes) noexcept with gil:
    cdef Mmu mmu = <Mmu>hook
    cdef int busy = mmu.c.mem.busy
    mmu.c.mem.busy = True           # the callback may not use its VM
    try:
        return 1 if mmu._can_emulate(gva, gpa, nbytes) else 0
    except BaseException as error:
        mmu.hook_error = error
        return -1
    finally:
        mmu.c.mem.busy = busy


# The structures of state.pxd, field by field.
PAGE_DTYPE = np.dtype([
    ("gfn", "<u8"), ("role", "<u4"), ("root_count", "<u4"), ("hash_next", "<u4"), ("prev", "<u4"), ("next", "<u4"),
    ("parents", "<u4"), ("present", "<u4"), ("active", "u1"), ("nonglobal", "u1"), ("unsync", "u1"), ("flood", "u1"),
    ("unsync_children", "<u4"), ("flood_at", "<u4"), ("slots", "<u8"), ("used", "<u8", 8),
])
FRAME_DTYPE = np.dtype([("rmap", "<u4"), ("shadowed", "<u2"), ("stale", "<u2")])
LINK_DTYPE = np.dtype([("prev", "<u4"), ("next", "<u4")])
assert (PAGE_DTYPE.itemsize, FRAME_DTYPE.itemsize, LINK_DTYPE.itemsize) == (
    sizeof(sc_page), sizeof(sc_frame), sizeof(sc_link))

MEMBER_DTYPE = np.dtype([
    ("gfn", "<u8"), ("rank", "<u8"), ("role", "<u4"), ("chain", "<u4"), ("prev", "<u4", 2), ("next", "<u4", 2),
    ("slot", "<u4"), ("born", "<u4"), ("queue", "u1", 2), ("uses", "u1"), ("hot", "u1"), ("pad", "<u4"),
])
assert MEMBER_DTYPE.itemsize == sizeof(sc_member)

HISTORY_DTYPE = np.dtype([
    ("key", "<u8"), ("balance", "<i4"), ("storm", "<i4"), ("worth", "<u4"), ("load", "<u4"), ("last", "<u4"),
    ("group", "<u4"), ("stores", "<u4"), ("unsyncs", "<u4"), ("idle", "<u4"), ("fills", "<u4"), ("invlpgs", "<u4"),
    ("zaps", "<u4"),
    ("fills_now", "<u2"), ("invlpgs_now", "<u2"), ("uses_now", "<u2"), ("cycles", "<u2"), ("changes", "<u2"),
    ("kept", "u1"), ("why", "u1"), ("doubts", "u1"), ("absent", "u1"), ("pad", "<u2"),
])
assert HISTORY_DTYPE.itemsize == sizeof(sc_history)

# The arrays of Mmu._arrays, in their order; those from `below` on are there if pages can be unsync, `history` if the
# design is adaptive.
_ARRAYS = {
    "pages": PAGE_DTYPE, "frames": FRAME_DTYPE, "links": LINK_DTYPE, "hash": np.dtype("<u4"), "below": np.dtype("<u8"),
    "mapped": np.dtype("<u2"), "large_rmap_2m": np.dtype("<u4"), "no_large_2m": np.dtype("<u4"),
    "large_rmap_1g": np.dtype("<u4"), "no_large_1g": np.dtype("<u4"), "history": HISTORY_DTYPE,
}

RECORDED = ("accessed", "dirty", "made", "found", "synced", "unsync", "zapped", "leaf", "device", "device_hit",
            "exit", "emulated", "all_zapped", "device_checked", "changed", "split", "fast")
assert len(RECORDED) == RECORD_COUNT
RECORD_DTYPE = np.dtype([("a", "<u8"), ("b", "<u8"), ("kind", "<u4"), ("c", "<u4")])
assert RECORD_DTYPE.itemsize == sizeof(sc_event)

REFERENCE_DTYPE = np.dtype([
    ("hpa", "<u8"), ("gva", "<u8"), ("walk", "<u4"), ("vcpu", "u1"), ("level", "u1"), ("dimension", "u1"),
    ("size", "u1"),
])
assert REFERENCE_DTYPE.itemsize == sizeof(sc_reference)
DIMENSIONS = ("guest", "host", "shadow")

# In the order of CHANGE_*.
EXIT_CHANGES = ("made", "found", "zapped", "flooded", "recycled", "synced", "installed", "removed")
assert len(EXIT_CHANGES) == CHANGES
EXIT_DTYPE = np.dtype({
    "names": ["operation", "gva", "gfn", "error_code", *EXIT_CHANGES, "vcpu", "reason"],
    "formats": ["<u8"] * 4 + ["<u4"] * CHANGES + ["u1"] * 2,
    "itemsize": sizeof(sc_exit),
})
assert EXIT_DTYPE.fields["reason"][1] == <size_t>&(<sc_exit *>NULL).reason

cdef enum:
    FIRST_ROOM = 1 << 12            # for exits, where there may be any number of them

PAGES_DTYPE = np.dtype([
    ("page", "<u4"), ("gfn", "<u8"), ("glevels", "u1"), ("level", "u1"), ("quadrant", "u1"), ("direct", "u1"),
    ("access", "u1"), ("nxe", "u1"), ("pse", "u1"), ("wp0", "u1"), ("global_", "u1"), ("pkey", "u1"),
    ("root_count", "<u4"), ("present", "<u2"), ("parents", "<u4"), ("age", "<u4"), ("unsync", "u1"), ("flood", "u1"),
    ("unsync_children", "<u4"), ("nested", "u1"), ("host", "u1"),
])


cdef int mmu_listen(object mmu, sc_reference_hook hook, void *context) except -1:
    cdef Mmu listened = mmu
    listened.idle()
    listened.walk_log.hook = hook
    listened.walk_log.context = context
    listened._fast_settled()
    return 0


cdef u32 _host_level(const sc_mmu *c, u32 level):
    """The level of the largest pages that a slot has in the host, at least `level`."""
    cdef int i
    for i in range(c.mem.nslots):
        if c.mem.slots[i].npages:
            level = max(level, <u32>c.mem.slots[i].host_level)
    return level


cdef class Mmu:
    """The MMU of a VM: `design`, `stats`, and the shadow structure as arrays.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> cpu.write(0x401000, 7)
    >>> vm.mmu
    Mmu(cached, 8 of 256 pages in use)
    >>> vm.mmu.pages["level"].tolist()
    [1, 2, 3, 4, 2, 2, 2, 2]
    """

    def __cinit__(self, Memory memory, design, future=None, record_uses=False):
        cdef u64 buckets = 4
        self.c = <sc_mmu *>calloc(1, sizeof(sc_mmu))
        if self.c == NULL:
            raise MemoryError
        memset(&self.counters, 0, sizeof(self.counters))
        design = checked_design(design)
        if not isinstance(design, Native):
            design = design.of_memory(memory.mem.nframes)
        self.memory = memory
        self.design = design
        self.stats = Stats(self)
        self.stats.c = &self.counters
        self.c.mem = &memory.mem
        self.c.stats = &self.counters
        memset(&self.watch, 0, sizeof(self.watch))
        memset(&self.walk_log, 0, sizeof(self.walk_log))
        memset(&self.ring, 0, sizeof(self.ring))
        memset(&self.exit_log, 0, sizeof(self.exit_log))
        self._events = kept_new("events", "Mmu.record", RECORD_DTYPE, <void **>&self.ring.event, &self.ring.room)
        self._walked = kept_new("references of walks", "VM.record_walks", REFERENCE_DTYPE,
                                <void **>&self.walk_log.reference, &self.walk_log.room)
        self._exits = kept_new("exits", "VM.record_exits", EXIT_DTYPE, <void **>&self.exit_log.exit,
                               &self.exit_log.room)
        self.c.free_head = self.c.young = self.c.old = SC_NONE
        self._arrays = []
        self._books = {}
        self._vcpus = []
        memset(&self.books, 0, sizeof(self.books))
        memset(&self.histories, 0, sizeof(self.histories))
        memset(&self.references, 0, sizeof(self.references))
        self._general = os.environ.get("SHADOWCORE_GENERAL", "0") not in ("", "0")
        self.c.quirks = int(design.quirks)
        (<sc_maker><size_t>_DESIGNS[design.engine])(self.c)
        policy = design.policy if isinstance(design, Shadow) else "fifo"
        (<sc_maker><size_t>_POLICIES.get(policy, _POLICIES["fifo"]))(self.c)
        if record_uses:
            if not isinstance(design, Shadow):
                raise ConfigError(f"record_uses: a shadow MMU is needed, not {design.name!r}")
            self._record_uses()
        if not self.c.shadow:
            self._marks = allocate(sizeof(u64) * memory.mem.nframes)
            self.c.marks = <u64 *><size_t>self._marks.ctypes.data
        if isinstance(design, Native):
            self.host_backs()
            return
        memory.attach_pool(design.pool_pages)
        self.c.pool_pages = design.pool_pages
        self.c.min_free = design.min_free
        self.c.refill = design.refill
        if isinstance(design, Shadow):
            self.c.flood_threshold = design.flood_threshold or 0
            self.c.flood_reset = design.flood_reset
            self.c.flood_pages = design.flood_pages
            self.c.flood_forget = design.flood_forget or 0
            self.c.in_place = design.update_in_place
            self.c.prefetch = design.prefetch
            self.c.absent = _MARKERS.index(design.notpresent_marker)
            if design.switching:
                self._prepare_agile(design)
        self.c.hash_shift = 62
        while buckets < self.c.pool_pages:
            buckets *= 2
            self.c.hash_shift -= 1
        self.c.table = memory.mem.pool
        self.c.pages = <sc_page *>self._array(sizeof(sc_page) * self.c.pool_pages)
        self.c.frames = <sc_frame *>self._array(sizeof(sc_frame) * memory.mem.nframes)
        self.c.links = <sc_link *>self._array(sizeof(sc_link) * 512 * self.c.pool_pages)
        self.c.hash = <u32 *>self._array(sizeof(u32) * buckets)
        pool_init(self.c)
        if self.c.lists_all:
            self._prepare_unsync(design)
            if isinstance(design, Shadow) and design.adapts:
                self._prepare_adaptive(design)
        if isinstance(design, Shadow):
            self.c.policy.children = design.recycle_children
            if policy not in _POLICIES and not record_uses:
                self._policy = plug_policy(self.c, policy, plugin(Policy, policy))
            if not self.c.lists_all and (design.prefetch or design.flood_pages or design.update_in_place):
                neighbours_follow(self.c)       # before the policy, whose hooks stand before these
        if self.c.policy.made != NULL:
            self._prepare_policy(design, future)
        elif future is not None:
            raise ConfigError("future: a shadow MMU with policy 'optimal' is needed")
        pool_recycles(self.c)
        self._plug(design)
        self.host_backs()

    def host_backs(self) -> None:
        """From now on the host below calls back, if account is kept of what it has. Memory says so."""
        cdef sc_backing *host = self.c.mem.host
        if host != NULL:
            host.withdrawn = _host_withdrawn
            host.context = self.c
            host.faults = &self.counters.host_faults
            host.faults_large = &self.counters.host_faults_large
            host.outer_faults = &self.counters.outer_faults
            host.outer_large = &self.counters.outer_faults_large
        self._slots_settled()

    def _slots_settled(self):
        """What follows from the memory slots as they are, and from the host below."""
        cdef u32 level = 1 if self.c.mem.host == NULL else 2
        cdef u32 page
        for cpu in self._vcpus:
            cpu._take_fast_paths(self.is_fast())
        if not self.c.lists_all:
            return
        level = _host_level(self.c, level)
        if level > 1 and self.c.host_level <= 1:
            self.c.host_level = level               # from now on reasons against large leaves are counted
            for page in range(self.c.pool_pages):
                if self.c.pages[page].active:
                    count_no_large(self.c, &self.c.pages[page], 1)
        self.c.host_level = max(self.c.host_level, level)

    def slots_changed(self, what, slot, described) -> None:
        """Memory slots are about to change ("adding", "removing", "moving") or have changed ("added", "removed",
        "moved"): slot number `slot`, `described` (MemorySlot) as it is afterwards, or was. Memory says so."""
        cdef int code
        self.idle()
        if what in ("added", "removed", "moved"):
            memo_drop(self.c)
            if self.c.design.slot_changed != NULL:
                self.c.design.slot_changed(self.c)
            else:
                request_flush(self.c, FLUSH_SLOTS)
            self._slots_settled()
            self._report()
        elif self.c.design.slot_changes != NULL:
            code = {"adding": SLOT_ADDED, "removing": SLOT_REMOVED, "moving": SLOT_MOVED}[what]
            self.c.design.slot_changes(self.c, code, described.gpa >> 12, described.size >> 12)

    def host_unmap(self, gfn, n=1, discard=False) -> None:
        """See VM.host_unmap."""
        self.idle()
        cdef list runs = self.memory.runs(gfn, n)
        cdef bint gone = check_bool("discard", discard)
        cdef u64 at, frame, count, i
        self.memory.back()
        for at, frame, count in runs:
            host_unmap(self.c.mem.host, frame, count, not gone)
            if gone:
                for i in range(count):
                    if self.c.shadow and self.c.frames[frame + i].shadowed:
                        self.c.design.unprotect(self.c, at + i)     # what it shadows is no table any more
                self.memory.bytes[frame << 12:(frame + count) << 12] = 0
        self._report()

    def host_touch(self, gfn, n=1, write=True) -> None:
        """See VM.host_touch."""
        self.idle()
        cdef list runs = self.memory.runs(gfn, n)
        cdef bint stores = check_bool("write", write)
        cdef u64 frame, count, i
        for _, frame, count in runs:
            for i in range(count):
                if self.c.mem.host != NULL:
                    host_touch(self.c.mem.host, frame + i, stores)
        self._report()

    def host_collapse(self, gfn, n=512) -> None:
        """See VM.host_collapse."""
        self.idle()
        cdef list runs = self.memory.runs(gfn, n)
        cdef u64 frame, count
        for at, frame, count in runs:
            if frame & 511 or count & 511:
                raise ConfigError(f"gfn, n: {count} frames from {at:#x} on are no whole blocks of 2 MiB of guest RAM")
        self.memory.back()
        for _, frame, count in runs:
            host_collapse(self.c.mem.host, frame, count)
        self._report()

    cdef int _prepare_unsync(self, design) except -1:
        """What only a design needs that lists every leaf."""
        cdef u64 frames = self.memory.mem.nframes
        self.c.prefetch = design.prefetch
        self.c.largest = 3
        if isinstance(design, Nested):
            self.c.tdp = design.mmu == "tdp"
            self.c.host_levels = design.levels
            self.c.largest = HOST_PAGES.index(design.host_page_size) + 1
        else:
            self.c.prev_roots = design.prev_roots
            self.c.rewrites = design.release != "6.12"
            self.c.one_role = design.release == "2.6.28"
        self.c.host_level = _host_level(self.c, 1)
        self.c.below = <u64 *>self._array(8 * sizeof(u64) * self.c.pool_pages)
        self.c.mapped = <u16 *>self._array(sizeof(u16) * frames)
        for i in range(2):
            self.c.large_rmap[i] = <u32 *>self._array(sizeof(u32) * ((frames >> 9 * (i + 1)) + 1))
            self.c.no_large[i] = <u32 *>self._array(sizeof(u32) * ((frames >> 9 * (i + 1)) + 1))
        return 0

    cdef int _prepare_agile(self, design) except -1:
        """What only a design needs that has the processor walk some of the guest's tables itself."""
        self.c.nested_writes = design.nested_writes
        self.c.nested_interval = design.nested_interval
        self.c.nested_back = _WAYS_BACK.index(design.nested_back)
        self._books["written"] = allocate(sizeof(u32) * self.memory.mem.nframes)
        self.c.written = <u32 *><size_t>self._books["written"].ctypes.data
        return 0

    cdef int _prepare_adaptive(self, design) except -1:
        """What is remembered of tables, and the prices of the ways to keep them."""
        cdef sc_histories *h = &self.histories
        cdef u64 groups = 4
        try:
            costs = find_costs(design.prices)
        except ConfigError as error:
            raise ConfigError(f"prices: {str(error).removeprefix('costs: ')}") from None
        read = 4 * costs.guest_reference
        exit_ = costs.exit_fault * costs.switches + costs.dispatch + costs.carried
        h.shift = 62
        while groups < <u64>(self.c.pool_pages // 2):
            groups *= 2
            h.shift -= 1
        for i, name in enumerate(_RULES):
            if name in design.rules:
                h.rules |= 1 << i
        prices = {
            "write": exit_ + costs.rights + read,
            "fill": exit_ + costs.fill + read + costs.entry,
            "emulate": exit_ + costs.emulate + read,
            "invlpg": costs.exit_invlpg * costs.switches + costs.dispatch + costs.carried + costs.flush_page,
            "page": costs.page_new + costs.page_zap + 2 * costs.entry,
        }
        whole = {name: min(round(price), 1 << 20) for name, price in prices.items()}
        h.write, h.fill, h.emulate, h.invlpg, h.page = whole.values()
        h.entry = <sc_history *>self._array(sizeof(sc_history) * HISTORY_GROUP * groups)
        self.c.histories = h
        return 0

    def explain(self, gfn):
        """Design `adaptive`: how the guest's table at `gfn` is kept, and why, as a TableHistory. ConfigError for
        another design.

        >>> print(sc.VM("16MiB", "adaptive").mmu.explain(7))
        table 0x7: a store lets it run out of sync, for nothing is known of it
        """
        cdef u64 number = check_int("gfn", gfn, 0, (1 << 52) - 1)
        cdef const sc_history *e
        self._looks("explain")
        if self.c.histories == NULL:
            raise ConfigError(f"explain: the design {self.design.name!r} decides by no history; 'adaptive' does")
        e = history_find(self.c.histories, number)
        page = self.c.hash[hash_bucket(self.c, number)]
        level = 0
        while page != SC_NONE and page < self.c.pool_pages:
            if shadows(self.c, page, number):
                level = max(level, role_level(self.c.pages[page].role))
            page = self.c.pages[page].hash_next
        if e == NULL:
            return TableHistory(gfn=number, level=level)
        return TableHistory(
            number, level, True, e.kept, e.why, e.balance, e.storm, e.doubts, e.changes, e.stores, e.unsyncs, e.idle,
            e.fills, e.invlpgs, e.zaps,
        )

    cdef int _prepare_policy(self, design, future) except -1:
        """The books of a policy that keeps some."""
        cdef sc_queues *q = &self.books
        cdef u64 members = 3 * <u64>self.c.pool_pages
        cdef u32 buckets = 4
        memset(q, 0, sizeof(sc_queues))
        q.n_pages = self.c.pool_pages
        q.n_ghosts = 2 * self.c.pool_pages
        q.shift = 62
        while buckets < q.n_ghosts:
            buckets *= 2
            q.shift -= 1
        q.random = (design.policy_seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _WORD or 1
        self._books |= {"members": allocate(sizeof(sc_member) * members), "ghosts": allocate(sizeof(u32) * buckets),
                        "order": allocate(sizeof(u32) * self.c.pool_pages)}
        q.member = <sc_member *><size_t>self._books["members"].ctypes.data
        q.bucket = <u32 *><size_t>self._books["ghosts"].ctypes.data
        q.order = <u32 *><size_t>self._books["order"].ctypes.data
        q.pages = self.c.pages
        queues_init(q)
        self.c.policy.queues = q
        self.c.design.invariants |= 1 << 14
        for i, name in enumerate(_USES):
            if name == "walk" if self.c.policy.own != NULL else name in design.uses:
                self.c.policy.uses |= 1 << i
        if design.policy == "optimal" and self.c.policy.own == NULL:
            if not isinstance(future, Future):
                raise ConfigError("policy: 'optimal' needs to know what is to come: a study of a workload or recording,"
                                  " or VM(future=...)")
            self._future = future
            q.n_future = len(future)
            q.future = <const u64 *><size_t>future.next_use.ctypes.data
            q.futures = <const u64 *><size_t>future.keys.ctypes.data
            q.by_key = <const u64 *><size_t>future.by_key.ctypes.data
        elif future is not None:
            raise ConfigError("future: a shadow MMU with policy 'optimal' is needed")
        uses_follow(self.c)
        return 0

    def _plug(self, design):
        """Policy and decisions of other packages, from now on told and asked."""
        if self._policy is not None:
            self.c.policy.own = (<Plugged>self._policy).own
        if isinstance(design, Shadow) and design.decides:
            self._decides = plug_decisions(self.c, design.decides, plugin(Decisions, design.decides))
        for plugged in (self._policy, self._decides):
            if plugged is not None:
                (<Plugged>plugged).show(window(self._arrays[0], None).view(PAGE_DTYPE))

    def export_plugins(self) -> dict:
        """What the plug-ins of the machine have kept, as bytes: "policy", "decides". ConfigError for one that does not
        say it, PluginError for one that does wrong."""
        self.still()
        plugged = {"policy": self._policy, "decides": self._decides}
        return {name: (<Plugged>one).save() for name, one in plugged.items() if one is not None}

    def import_plugins(self, dict states) -> None:
        """Put back what export_plugins gave, after all else. PluginError for what a plug-in refuses."""
        self.idle()
        for name, plugged in (("policy", self._policy), ("decides", self._decides)):
            if plugged is not None:
                (<Plugged>plugged).restore(states[name])

    def _plugin_error(self):
        """What a plug-in has done wrong, or None."""
        errors = [(<Plugged>plugged).take() for plugged in (self._policy, self._decides) if plugged is not None]
        return next((error for error in errors if error is not None), None)

    def _record_uses(self):
        self.c.policy.own = &self.references
        recorder_policy(self.c)

    def recorded_uses(self):
        """What a VM(record_uses=True) has recorded so far, for `Future`: keys of the shadow pages that the processor's
        walks came through (uint64), and of the pages that the guest's own doing zapped, with the number of uses before
        that (uint64 each)."""
        if self.c.policy.own != &self.references:
            raise ConfigError("recorded_uses: nothing is recorded, see VM(record_uses=True)")
        if self.references.failed:
            raise MemoryError
        found = []
        for at, n in ((<size_t>self.references.use, self.references.n), (<size_t>self.references.death,
                      self.references.deaths), (<size_t>self.references.death_at, self.references.deaths)):
            array = np.empty(n, dtype=np.uint64)
            if n:
                memcpy(<void *><size_t>array.ctypes.data, <const void *><size_t>at, n * sizeof(u64))
            found.append(array)
        return tuple(found)

    @property
    def strayed(self) -> int:
        """Uses that were not of the page that `future` said."""
        return self.books.strayed

    def __dealloc__(self):
        references_free(&self.references)
        free(self.c)

    cdef int idle(self) except -1:
        """EngineError while another thread runs a batch on this VM, or a callback of it: one VM, one user at a time;
        and while somebody holds an array of writable_arrays. AuditError if what was written there cannot be used."""
        cdef sc_audit a
        if self.c.mem.busy and mmu_settle(self.c, &a) != RC_OK:
            self.still()
            raise AuditError(audit_violations(&a), a.n, "writable_arrays")
        if self.c.exits != NULL:
            exits_close(self.c)
        return 0

    cdef int still(self) except -1:
        """What follows looks at each index before it follows that. EngineError while somebody could change it."""
        if self.c.mem.busy & SC_RUNNING:
            raise EngineError("this VM is in use, by a batch in another thread or by the callback that makes this call")
        if self.c.mem.lent:
            raise EngineError("an array of vm.mmu.writable_arrays() is still held, or a view or buffer of one: the VM "
                              "can be used again when all have been let go")
        return 0

    cdef int enter(self, bint unsettled=False) except -1:
        """Work begins that does without the GIL, and that signals can end; until `leave`. unsettled: work that can do
        with whatever was written to the arrays."""
        if unsettled:
            self.still()
        else:
            self.idle()
        self.c.mem.busy |= SC_RUNNING
        self.c.watch = &self.watch
        return 0

    cdef void leave(self) noexcept:
        self.c.mem.busy &= ~<int>SC_RUNNING
        self.c.watch = NULL

    cdef object stopped(self):
        """Between operations of such work: why it has to end, or None. Looks for signals if it is time."""
        if self.c.audit_found:
            return self.failure(RC_AUDIT)
        if watch_due(self.c.watch) and watch_look(self.c.watch):
            return watch_raised(self.c.watch)
        return None

    cdef object failure(self, int rc):
        """The exception for a negative return code."""
        if rc in (RC_AUDIT, RC_HOOK) and self.hook_error is None:
            self.hook_error = self._plugin_error()
        if rc == RC_AUDIT and self.hook_error is None:
            self.hook_error = watch_raised(&self.watch)
        if rc == RC_HOOK or (rc == RC_AUDIT and self.hook_error is not None):
            error, self.hook_error = self.hook_error, None
            if self.c.audit_found == HOOK_RAISED:
                self.c.audit_found = 0
            return error
        if rc == RC_AUDIT:
            return self.audits.take()
        if rc == RC_EXHAUSTED:
            return self._exhausted()
        if rc == RC_LIVELOCK and self.c.quirks & QUIRK_ROOT_EMPTIED:
            return EngineError(f"an access does not complete: with the quirk ROOT_EMPTIED a pool of {self.c.pool_pages}"
                               " pages loses those that the access needs while it takes them; the original hangs here")
        if rc == RC_LIVELOCK:
            return EngineError("an access does not complete: the shadow and the guest's tables disagree for good")
        if rc == RC_UNHANDLED:
            return EngineError("a store cannot be emulated, and its table serves as a root in use and stays protected")
        if rc == RC_UNGRANTED:
            return EngineError("a store cannot be emulated, and no shadow leaf can grant it: supervisor code stores to"
                               " a read-only page, with CR0.WP clear and SMEP, SMAP or protection keys on")
        return EngineError(f"internal error {rc}")

    def _exhausted(self):
        """PoolExhausted for the vcpu that found no room: what the others pin, and what it needs beside that."""
        cdef sc_vcpu *v = self.c.vcpus[self.c.exhausted]
        cdef u32 i, slot, page
        own = set()
        others = set()
        for i in range(self.c.n_vcpus):
            for slot in range(4):
                page = self.c.vcpus[i].roots[slot]
                if page != SC_NONE:
                    (own if i == v.number else others).add(page)
        levels = v.guest.mode if v.guest.mode >= MODE_64 else 2
        if self.c.nested:
            gfns = tuple([self.c.pages[page].gfn for page in sorted(own | others)])
            needed = host_tables_of_walk(self.c, v) + (0 if self.c.tdp else self.c.refill)
            return PoolExhausted(needed, self.c.pool_pages, gfns)
        needed = len(others) + levels - (1 if own and own <= others else 0)
        gfns = []
        for page in sorted(others | own):
            gfns.append(self.c.pages[page].gfn)
        return PoolExhausted(needed, self.c.pool_pages, tuple(gfns))

    cdef void *_array(self, u64 nbytes) except NULL:
        array = allocate(nbytes)
        self._arrays.append(array)
        return <void *><size_t>array.ctypes.data

    @property
    def arrays(self) -> dict:
        """The live structures, as read-only arrays that share memory with the engine: table (uint64[pages, 512]), pages
        (PAGE_DTYPE), frames (FRAME_DTYPE, per frame of RAM), links (LINK_DTYPE, per spte), hash (uint32).

        Of policies that keep books: members (MEMBER_DTYPE, per page, then per ghost), ghosts (uint32: heads of buckets)
        and order (uint32: pages, a heap). Design `agile` has written (uint32, per frame: emulated stores, below the
        number of the interval in which they were). Design `unsync` has more: below (uint64[pages, 8]: a bit per entry,
        of those that are marked), mapped (uint16, per frame: leaves that map it); and per block of 2 MiB and of 1 GiB
        of RAM large_rmap_2m, large_rmap_1g (uint32: heads of the lists of large leaves) and no_large_2m, no_large_1g
        (uint32: reasons against such leaves); `adaptive` has history
        (HISTORY_DTYPE: what it remembers of guest tables), too.

        What is read while a batch runs may be of any moment. ConfigError under `native`, which has none.
        """
        return self._windows("arrays", None)

    def writable_arrays(self) -> dict:
        """`arrays`, to be written to, for experiments and tests.

        While one of them is held, or a view or a buffer of one (a VM whose RAM it is, say), whatever uses the VM raises
        EngineError, in this thread or another. When all have been let go, the first call that uses the VM checks I3 to
        I7 and I13 (design `unsync`: I10 to I12 as well) once, in time linear in the size of the structure: AuditError,
        of point "writable_arrays", if they do not hold, and nothing is followed or changed. So it is until other values
        have been written; `vm.audit` works, and `pages`, `table`, `rmap` and `roots`, which check as they go. Addresses
        of their memory (`ctypes.data`) must not be written to once the arrays are gone.
        """
        return self._windows("writable_arrays", self.memory)

    cdef dict _windows(self, what, lender):
        if self.c.pages == NULL or lender is not None and self.c.mem.busy & SC_RUNNING:
            self._shadow(what)
        cdef dict found = {"table": window(self.memory.tables, lender).view(np.uint64).reshape(-1, 512)}
        for (name, dtype), array in zip(_ARRAYS.items(), self._arrays, strict=False):
            found[name] = window(array, lender).view(dtype)
        if self.c.lists_all:
            found["below"] = found["below"].reshape(-1, 8)
        for name, array in self._books.items():
            found[name] = window(array, lender).view(MEMBER_DTYPE if name == "members" else np.dtype("<u4"))
        return found

    def settle(self) -> None:
        """Check what was written through `writable_arrays` (or put back by import_state), as the next call that uses
        the VM would. For code that calls the engine's C functions itself; see there for the errors."""
        self.idle()

    @property
    def can_emulate(self):
        """Callable (gva, gpa, nbytes) -> bool, asked before a store is emulated; None: always yes.

        Stores are emulated to guest tables, and where supervisor code stores to a read-only page with CR0.WP clear and
        SMEP, SMAP or protection keys on, which no shadow leaf can grant. A store over a page boundary is asked for page
        by page. Where it says no, a table is unprotected and the store is made natively (patch 14); EngineError, with
        nothing stored, if the table serves as a root in use, or no leaf can grant the store. An exception that the
        callable raises comes out of the call that made the access. It may not use the VM.
        """
        return self._can_emulate

    @can_emulate.setter
    def can_emulate(self, callback):
        self.idle()
        if callback is not None and not callable(callback):
            raise ConfigError(f"can_emulate: a callable or None is needed, not {callback!r}")
        self._can_emulate = callback
        if self._decides is not None:
            (<PluggedDecisions>self._decides).ask_too(callback)
            return
        self.c.hook = <void *>self
        self.c.can_emulate = NULL
        if callback is not None:
            self.c.can_emulate = _ask_can_emulate

    @property
    def general(self) -> bool:
        """For debugging and tests: every access takes the general way, and no fast path (memo, glance, fast fault).
        Nothing but the time may tell. The environment variable SHADOWCORE_GENERAL=1 has new machines begin with it."""
        return self._general

    @general.setter
    def general(self, value):
        self.idle()
        self._general = check_bool("general", value)
        for cpu in self._vcpus:
            cpu._take_fast_paths(self.is_fast())

    def is_fast(self) -> bool:
        """Accesses may take fast paths. Under `native` these ask neither the host below nor read-only slots, of which
        the guest's tables tell nothing."""
        told = self._general or self.c.policy.walked != NULL or self.c.walks != NULL or self.c.exits != NULL
        return not told and (self.c.shadow or self.c.nested or not self.c.mem.special)

    def record(self, size) -> None:
        """Record what the shadow MMU does (`recorded`), up to `size` events; 0: nothing more."""
        self._shadow("record")
        self._events.begin(size)
        self.c.ring = &self.ring if self.ring.room.size else NULL

    def recorded(self):
        """The events since the last call, as an array (RECORD_DTYPE; kinds in RECORDED), which begins anew. EngineError
        if there were more than there was room for."""
        self._shadow("recorded")
        return self._events.take()

    def _fast_settled(self):
        """Whether anybody is told of walks, or of exits, has changed. While somebody is, no fast path is open: those
        tell nobody."""
        self.c.walks = &self.walk_log if self.walk_log.hook != NULL or self.walk_log.room.size else NULL
        for cpu in self._vcpus:
            cpu._take_fast_paths(self.is_fast())

    def record_walks(self, size) -> None:
        """See `VM.record_walks`."""
        self.idle()
        self._walked.begin(size)
        self.walk_log.walks = 0
        self._fast_settled()

    def walks(self):
        """See `VM.walks`."""
        self.idle()
        return self._walked.take()

    def record_exits(self, size=None, first=0) -> None:
        """Log exits from now on (`exits`), up to `size` of them; None: however many there are; 0: no more. The
        operation that comes next has number `first`. See `VM.record_exits`."""
        self.idle()
        cdef u64 number = check_int("first", first, 0, 1 << 63)
        exits_leave(self.c)
        self._exits.begin(FIRST_ROOM if size is None else size)
        self.exit_log.grow = NULL
        if size is None:
            self.exit_log.grow = kept_grow
        self.exit_log.owner = <void *>self._exits
        if self.exit_log.room.size:
            exits_follow(self.c, &self.exit_log, number)
        self._fast_settled()

    def exits(self):
        """The exits since the last call, which begins anew, as an array (EXIT_DTYPE). ConfigError if none are logged,
        EngineError if there were more than there was room for. See `VM.record_exits`."""
        self.idle()
        if self.c.exits != NULL:
            exits_taken(self.c)
        return self._exits.take()

    def fail_pages(self, after, count=1) -> None:
        """For tests: `after` more pages can be taken from the pool, then `count` attempts fail."""
        self._shadow("fail_pages")
        self.c.fail_after = check_int("after", after, 0, 1 << 31)
        self.c.fail_for = check_int("count", count, 0, 1 << 31)

    def lose_flushes(self, *names) -> None:
        """For tests: TLB flushes for these reasons do not happen (none: all happen again)."""
        self.idle()
        for name in names:
            if name not in FLUSHES:
                raise ConfigError(f"lose_flushes: {name!r} is not one of {', '.join(FLUSHES)}")
        self.c.lost_flushes = sum(1 << FLUSHES.index(name) for name in set(names))

    def _repr_html_(self):
        from shadowcore.engine.shown import mmu_html
        return mmu_html(self)

    @property
    def pages(self):
        """Active shadow pages as a structured array (PAGES_DTYPE), newest first.

        page: number in the pool; gfn and role fields; root_count; present: entries in use; parents: sptes that
        point to it; age: distance from the recycling end (0 = next victim). Of design `unsync`, else 0: unsync; flood:
        emulated stores to the table since the page was last used; unsync_children: entries that are marked, as a page
        below them is unsync. Of design `agile`, else 0: nested: the page is empty, and stands for a guest table that
        the processor walks itself; host: it is a table of the host's.
        """
        cdef u32 n = self.c.n_active
        cdef u32 number = self.c.young
        cdef sc_page *p
        self.still()
        if n > self.c.pool_pages:
            raise EngineError(f"{n} pages are said to be in use, the pool has {self.c.pool_pages}: see vm.audit()")
        out = np.zeros(n, dtype=PAGES_DTYPE)
        for i in range(n):
            if number >= self.c.pool_pages:
                raise EngineError(f"the active list leads to page {number}, which does not exist: see vm.audit()")
            p = &self.c.pages[number]
            out[i] = (
                number, p.gfn, role_field(p.role, ROLE_GLEVELS, 15), role_level(p.role),
                role_field(p.role, ROLE_QUADRANT, 3), role_field(p.role, ROLE_DIRECT, 1),
                role_access(p.role), role_field(p.role, ROLE_NXE, 1), role_field(p.role, ROLE_PSE, 1),
                role_field(p.role, ROLE_WP0, 1), role_field(p.role, ROLE_GLOBAL, 1),
                role_field(p.role, ROLE_PKEY, 15), p.root_count,
                np.count_nonzero(self.memory.tables[number] & 1), len(self._list(p.parents)), n - 1 - i,
                p.unsync, p.flood, p.unsync_children, role_field(p.role, ROLE_NESTED, 1),
                role_field(p.role, ROLE_HOST, 1),
            )
            number = p.next
        return out

    @property
    def pages_used(self) -> int:
        """Shadow pages in use."""
        return self.c.n_active

    @property
    def pages_free(self) -> int:
        """Shadow pages that are free."""
        return self.c.n_free

    def table(self, page):
        """uint64[512]: the sptes of pool page `page` (a copy)."""
        self._looks("table")
        return self.memory.tables[check_int("page", page, 0, self.c.pool_pages - 1)].copy()

    def rmap(self, gfn):
        """uint32[n, 2]: (page, index) of each writable spte that maps `gfn`, newest first.

        Design `unsync`: of each leaf, writable or not; those of 4 KiB come first, then those of 2 MiB and of 1 GiB."""
        self._looks("rmap")
        cdef u64 frame = self.memory.frame(gfn)
        cdef list sptes = self._list(self.c.frames[frame].rmap)
        if self.c.lists_all:
            for i in range(2):
                sptes += self._list(self.c.large_rmap[i][frame >> 9 * (i + 1)])
        return np.array([(spte >> 9, spte & 511) for spte in sptes], dtype=np.uint32).reshape(-1, 2)

    def rmap_length(self, gfn) -> int:
        """Records of `gfn` in the reverse map, with those that the quirk RMAP_LEAK left behind."""
        self._looks("rmap_length")
        return len(self.rmap(gfn)) + self.c.frames[<u64>self.memory.frame(gfn)].stale

    cdef list _list(self, u32 head):
        """Members of a list of sptes. EngineError where the links, which may be written by hand, lead nowhere."""
        cdef u32 member = list_first(head)
        cdef u32 most = self.c.pool_pages * 512
        cdef list members = []
        while member:
            if member > most or <u32>len(members) == most:
                raise EngineError(f"a list of sptes leads to entry {member - 1}, which is not one: see vm.audit()")
            members.append(member - 1)
            member = list_next(self.c, head, member)
        return members

    def roots(self, vcpu=0):
        """Pool pages that serve as roots of vcpu number `vcpu`: one, or four of which those not loaded are None."""
        self._looks("roots")
        cdef sc_vcpu *v = self.c.vcpus[check_int("vcpu", vcpu, 0, self.c.n_vcpus - 1)]
        return [None if v.roots[i] == SC_NONE else v.roots[i] for i in range(root_slots(v))]

    def unsync_marks(self):
        """uint32[n, 2]: (page, index) of each entry that is marked: a page below it is, or lately was, unsync."""
        self._looks("unsync_marks")
        cdef u32 page, index
        marks = []
        if self.c.below != NULL:
            for page in range(self.c.pool_pages):
                for index in range(512):
                    if self.c.below[page * 8 + (index >> 6)] >> (index & 63) & 1:
                        marks.append((page, index))
        return np.array(marks, dtype=np.uint32).reshape(-1, 2)

    def unprotect(self, gfn) -> bool:
        """Zap the shadow pages of the guest table at `gfn`; True if there were any."""
        self._shadow("unprotect")
        cdef bint found = self.c.design.unprotect(self.c, check_int("gfn", gfn, 0, (1 << 52) - 1))
        self._report()
        return found

    def zap_all(self) -> None:
        """Zap every shadow page; roots in use stay, empty."""
        self._shadow("zap_all")
        self.c.design.zap_all(self.c)
        self._report()

    def _report(self):
        if self.c.audit_found:
            raise self.failure(RC_AUDIT)

    def write_physical(self, gpa, bytes data) -> None:
        """A device's store; see VM.write_physical."""
        cdef u64 address = self._range(gpa, len(data), True)
        cdef const u8 *at = data
        cdef u64 left = len(data)
        cdef u32 part
        while left:
            part = <u32>min(left, 4096 - (address & 4095))
            device_store(self.c, address, at, part)
            address += part
            at += part
            left -= part
        self._report()

    def read_physical(self, gpa, size) -> bytes:
        """Bytes of guest physical memory; see VM.read_physical."""
        cdef u64 left = check_int("size", size, 0, 1 << 48)
        cdef u64 address = self._range(gpa, left)
        cdef list parts = []
        cdef u64 part
        while left:
            part = min(left, 4096 - (address & 4095))
            mem_touch(self.c.mem, address >> 12, False)
            parts.append((<const char *>mem_guest_frame(self.c.mem, address) + (address & 4095))[:part])
            address += part
            left -= part
        return b"".join(parts)

    def _range(self, gpa, size, stores=False):
        self.idle()
        cdef u64 first = check_int("gpa", gpa, 0, 1 << 52)
        cdef u64 gfn
        for gfn in range(first >> 12, (first + size + 4095) >> 12):
            if mem_frame(self.c.mem, gfn) == sc_no_frame():
                raise ConfigError(f"gpa: {size} bytes at {first:#x} do not lie in memory slots")
            if stores and mem_is_rom(self.c.mem, gfn):
                raise ConfigError(f"gpa: {size} bytes at {first:#x} do not lie in slots that may be written")
        return first

    def counters_reset(self) -> None:
        """The counters are about to be set to 0, but for gauges: remember how many sptes are present."""
        self.idle()
        self.c.spte_base += self.counters.spte_installed - self.counters.spte_removed

    def export_state(self) -> dict:
        """The scalars of the MMU and its counters; with `arrays` and the vcpus' states, all of it (VM.save)."""
        self.still()
        cdef sc_mmu *c = self.c
        state = {"n_free": c.n_free, "n_active": c.n_active, "free_head": c.free_head, "young": c.young, "old": c.old,
                 "n_pte4": c.n_pte4, "n_pte8": c.n_pte8, "flush_epoch": c.flush_epoch, "spte_base": c.spte_base,
                 "store_clock": c.store_clock}
        if c.lists_all:
            state |= {"n_dying": c.n_dying, "generation": c.generation, "valid_gen": c.valid_gen,
                      "host_level": c.host_level}
        if c.written != NULL:
            state |= {"nested_clock": c.nested_clock, "nested_since": c.nested_since, "nested_number": c.nested_number}
        state["counters"] = self.stats.as_array().tolist()
        if c.histories != NULL:
            state["loads"] = c.histories.loads
        if c.policy.queues != NULL:
            state["policy"] = [int(word) for word in self._book_words()]
        return state

    cdef object _book_words(self):
        """What is saved of the books beside their arrays, as words that share memory with them."""
        cdef u64 size = <u64>(<size_t>&self.books.member - <size_t>&self.books)
        return np.frombuffer(PyMemoryView_FromMemory(<char *>&self.books, <Py_ssize_t>size, PyBUF_WRITE), dtype="<u4")

    def import_state(self, dict state) -> None:
        """Put back what export_state gave; the arrays and vcpus have to be put back with it.

        ConfigError, and nothing changed, where a value is missing, or is none that the field can have. That the values
        agree with each other and with the arrays is checked by the first call that uses the VM, as after
        writable_arrays.
        """
        self.still()
        cdef sc_mmu *c = self.c
        cdef u64 *counters = <u64 *>&self.counters
        cdef list counted = check_ints("counters", state.get("counters"), sizeof(sc_stats) // sizeof(u64), _WORD)
        cdef u32 none = SC_NONE
        pages = [check_int(name, state.get(name), 0, c.pool_pages) for name in _COUNTS]
        dying = check_int("n_dying", state.get("n_dying"), 0, c.pool_pages) if c.lists_all else 0
        generation = check_int("generation", state.get("generation"), 0, _WORD) if c.lists_all else 0
        level = c.host_level
        if c.lists_all:
            level = check_int("host_level", state.get("host_level"), _host_level(c, 1 if c.mem.host == NULL else 2), 3)
        valid_gen = check_int("valid_gen", state.get("valid_gen"), 0, 1) if c.lists_all else 0
        clock = check_int("store_clock", state.get("store_clock"), 0, 0xFFFFFFFF)
        cdef list rule = [0, 0, 0]
        if c.written != NULL:
            rule = [check_int(name, state.get(name), 0, most) for name, most in _RULE.items()]
            if rule[0] < rule[1]:
                raise ConfigError(f"nested_since: {rule[1]} is after nested_clock, {rule[0]}")
        loads = check_int("loads", state.get("loads"), 0, 0xFFFFFFFF) if c.histories != NULL else 0
        cdef list lists = []
        for name in _LISTS:
            page = state.get(name)
            lists.append(none if page == none else check_int(name, page, 0, max(1, c.pool_pages) - 1))
        epochs = [check_int(name, state.get(name), 0, _WORD) for name in ("flush_epoch", "spte_base")]
        if c.policy.queues != NULL:
            words = self._book_words()
            kept = check_ints("policy", state.get("policy"), len(words), 0xFFFFFFFF)
            for i in (0, 1, _SHIFT):
                check_int("policy", kept[i], int(words[i]), int(words[i]))
        if self._policy is not None:    # a new one
            self._policy = plug_policy(c, self.design.policy, plugin(Policy, self.design.policy))
            self._plug(None)
        c.n_free, c.n_active, c.n_pte4, c.n_pte8 = pages
        if c.policy.queues != NULL:
            words[:] = kept
        c.n_dying = dying
        c.generation = generation
        c.host_level = level
        c.valid_gen = valid_gen
        c.free_head, c.young, c.old = lists
        c.flush_epoch, c.spte_base = epochs
        c.store_clock = clock
        c.nested_clock, c.nested_since, c.nested_number = rule
        self.histories.loads = loads
        for i, number in enumerate(counted):
            counters[i] = number
        c.mem.busy |= SC_WRITTEN

    def slot_logged(self, slot, what, first=0, frames=0) -> None:
        """The dirty log of memory slot `slot` is about to begin ("start", or "set": with every frame in it), or to be
        cleared for some frames ("clear"); or it has ended ("stop"). Memory says so."""
        self.idle()
        cdef int index = check_int("slot", slot, 0, <int>self.c.mem.nslots - 1)
        if self.c.pages == NULL:
            return
        if what != "clear":
            generation_next(self.c)     # flags of a slot change
        if what == "start":
            self.c.design.protect_slot(self.c, index)
        elif what == "clear":
            self.c.design.log_cleared(self.c, index, first, frames)
        elif what == "stop" and self.c.design.log_stopped != NULL:
            self.c.design.log_stopped(self.c, index)
        self._report()

    def _shadow(self, what):
        self.idle()
        self._looks(what)

    def _looks(self, what):
        self.still()
        if self.c.pages == NULL:
            raise ConfigError(f"{what}: the design 'native' has no shadow tables")

    def __repr__(self):
        return f"Mmu({self.design.name}, {self.c.n_active} of {self.c.pool_pages} pages in use)"
