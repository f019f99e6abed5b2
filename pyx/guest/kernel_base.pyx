"""What a guest kernel is made of: it boots on a VM, its tables are allocated, its errors raised, its counters read."""
import numpy as np

from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from shadowcore.engine.memory cimport sc_mem
from shadowcore.engine.types cimport (
    MODE_32, MODE_64, MODE_LA57, MODE_OFF, MODE_PAE, RC_BAD_OP, RC_GP, RC_OK, u8, u32, u64,
)
from shadowcore.engine.vcpu cimport VCpu
from shadowcore.guest.boot cimport boot_registers, boot_tables
from shadowcore.guest.cpu cimport cpu_go
from shadowcore.guest.stacks cimport stack_places
from shadowcore.guest.state cimport (
    FRAME_WAS_TABLE, RC_NOLOG, RC_NOMEM, RC_NOROOM, RC_PANIC, RC_SEGV, guest_mix, guest_span, sc_gcount, sc_gcpu,
    sc_glog, sc_gpipe, sc_gproc, sc_gprogram, sc_gvma,
)

from shadowcore.config import Features, MemorySlot, taken
from shadowcore.engine.batch import OP_DTYPE as _OP_DTYPE
from shadowcore.engine.memory import allocate
from shadowcore.errors import ConfigError, GuestOutOfMemory, GuestPanic
from shadowcore.guest.options import DIRECT_MAPS as _DIRECT_MAPS, SLOPPY as _SLOPPY, KernelOptions


cdef tuple _names():
    """The fields of sc_gcount, in their order."""
    cdef sc_gcount counts
    memset(&counts, 0, sizeof(counts))
    fields = <dict>counts
    return tuple(fields)


COUNTERS = _names()
assert len(COUNTERS) * sizeof(u64) == sizeof(sc_gcount)
assert _OP_DTYPE.itemsize == sizeof(sc_glog)

cdef dict _MODES = {"32": MODE_32, "pae": MODE_PAE, "64": MODE_64, "la57": MODE_LA57}
cdef dict _KINDS = {1: "tables", 2: "anonymous", 3: "cache", 4: "kernel", 5: "boot"}


cdef class KernelBase:
    """A guest kernel, booted on a fresh VM with RAM from gpa 0; see shadowcore.guest.kernel.Kernel for what it does."""

    def __cinit__(self, vm, options=None):
        memset(&self.g, 0, sizeof(self.g))
        self._arrays = []
        if options is None:
            options = KernelOptions()
        options = taken(KernelOptions, options, "options")
        if not hasattr(vm, "vcpus") or not isinstance(vm.vcpus[0], VCpu):
            raise ConfigError(f"vm: a VM is needed, not {vm!r:.60}")
        self.vm = vm
        self.options = options
        self._cpu = vm.vcpus[0]
        self._cpu.mmu.idle()
        self._settings(options, taken(Features, vm.features, "vm: features"))
        self._layout(options)
        self._tables(options)
        self._boot(options)

    def __dealloc__(self):
        free(self.g.log)

    cdef void *_array(self, u64 items, u64 size) except NULL:
        array = allocate(items * size)
        self._arrays.append(array)
        return <void *><size_t>array.ctypes.data

    def _settings(self, options, features):
        cdef u64 lowmem = 896 << 20
        cdef u64 high
        cdef sc_mem *m = self._cpu.mmu.c.mem
        slot = MemorySlot(m.slots[0].base_gfn << 12, m.slots[0].npages << 12)
        if slot.gpa:
            raise ConfigError(f"vm: its memory starts at gpa {slot.gpa:#x}, RAM from 0 is needed")
        self.g.n_cpus = len(self.vm.vcpus)
        self.g.cpus = <sc_gcpu *>self._array(self.g.n_cpus, sizeof(sc_gcpu))
        for number, cpu in enumerate(self.vm.vcpus):
            self.g.cpus[<u32>number].v = (<VCpu?>cpu).c
            if self.g.cpus[<u32>number].v.guest.mode != MODE_OFF:
                raise ConfigError(f"vm: its processor {number} has paging on, a guest kernel boots on a fresh VM")
        for name, wanted in (("la57", options.mode == "la57"), ("pcid", options.pcid),
                             ("gbpages", options.direct_map == "huge")):
            if wanted and not getattr(features, name):
                raise ConfigError(f"vm: its processor lacks features.{name}, which these options need")
        high = lowmem if options.mode in ("32", "pae") else <u64>1 << min(features.maxphyaddr, 44)
        if slot.size > high:
            raise ConfigError(f"vm: memory of {slot.size} bytes is more than mode {options.mode!r} maps directly: "
                              f"at most {high}")
        if slot.size >> 12 >= 0xFFFFFFFF:
            raise ConfigError(f"vm: memory of {slot.size} bytes: at most {0xFFFFFFFE} frames are managed")
        self.g.mmu = self._cpu.mmu.c
        self.g.ram = self.g.mmu.mem.ram
        self.g.mode = _MODES[options.mode]
        self.g.all_frames = slot.size >> 12
        self.g.levels = self.g.mode
        self.g.pte_size = 4 if self.g.mode == MODE_32 else 8
        large = guest_span(&self.g, 2) >> 12
        if options.large_pages * large > self.g.all_frames // 2:
            raise ConfigError(f"large_pages: {options.large_pages} are more than half of memory, {slot.size} bytes")
        # Large pages lie at the end, aligned.
        self.g.nframes = self.g.all_frames
        if options.large_pages:
            self.g.all_frames -= self.g.all_frames % large
            self.g.nframes = self.g.all_frames - <u64>(options.large_pages * large)
        self.g.isolation = options.isolation
        self.g.pcid = options.pcid
        self.g.nx = features.nx and self.g.mode >= MODE_PAE
        self.g.sloppy = sum(_SLOPPY[name] for name in set(options.sloppy))
        self.g.atomic_bytes = options.atomic_bytes
        self.g.fault_around = options.fault_around
        self.g.flush_ceiling = options.flush_ceiling
        self.g.gather_room = options.flush_gather
        self.g.grouped = options.grouped
        self.g.regions = options.regions
        self.g.vmap_stacks = options.vmap_stacks
        self.g.heap_gap = options.heap_gap
        self.g.kernel_work = options.kernel_work
        self.g.age_flush = options.age_flush
        self.g.data_frames = options.kernel_data
        self.g.random = guest_mix(options.seed) | 1
        self.g.history = guest_mix(options.seed)
        self.g.mm_next = 1

    def _layout(self, options):
        """The address space of Linux, not randomized."""
        self.g.stack_limit = 8 << 20
        if self.g.mode >= MODE_64:
            self.g.direct_map = 0xFFFF888000000000 if self.g.mode == MODE_64 else 0xFF11000000000000
            self.g.task_size = 0x7FFFFFFFF000
            self.g.stack_top = 0x7FFFFFFFF000
            self.g.entry_va = 0xFFFFFE0000001000
            self.g.idt = 0xFFFFFE0000000000
            self.g.text = 0xFFFFFFFF81000000
            self.g.image = 0xFFFFFFFF82000000
            self.g.page_structs = 0xFFFFEA0000000000 if self.g.mode == MODE_64 else 0xFFD4000000000000
            self.g.stack_area = 0xFFFFC90000000000 if self.g.mode == MODE_64 else 0xFFA0000000000000
        else:
            self.g.direct_map = 0xC0000000
            self.g.task_size = 0xC0000000
            self.g.stack_top = 0xC0000000 - 4096
            self.g.entry_va = 0xFFE01000
        self.g.mmap_base = self.g.stack_top - self.g.stack_limit - (1 << 20)

    def _tables(self, options):
        cdef u32 i
        self.g.max_procs = options.max_processes
        self.g.max_vmas = options.max_mappings
        self.g.max_files = options.max_files
        self.g.cache_size = options.max_file_pages
        self.g.max_programs = options.max_programs
        self.g.max_pipes = options.max_pipes
        self.g.swap_pages = options.swap_pages
        self.g.count = <u32 *>self._array(self.g.all_frames, sizeof(u32))
        self.g.next_free = <u32 *>self._array(self.g.all_frames, sizeof(u32))
        self.g.kind = <u8 *>self._array(self.g.all_frames, 1)
        self.g.gather = <u64 *>self._array(self.g.gather_room, sizeof(u64))
        self.g.procs = <sc_gproc *>self._array(self.g.max_procs + 1, sizeof(sc_gproc))
        if options.vmap_stacks:
            self.g.stack_places = stack_places(&self.g)
            self.g.stack_state = <u8 *>self._array(self.g.stack_places, 1)
        self.g.vmas = <sc_gvma *>self._array((<u64>self.g.max_procs + 1) * self.g.max_vmas, sizeof(sc_gvma))
        self.g.file_first = <u64 *>self._array(self.g.max_files, sizeof(u64))
        self.g.file_pages = <u64 *>self._array(self.g.max_files, sizeof(u64))
        self.g.file_kind = <u8 *>self._array(self.g.max_files, 1)
        self.g.cache = <u32 *>self._array(self.g.cache_size, sizeof(u32))
        self.g.programs = <sc_gprogram *>self._array(self.g.max_programs, sizeof(sc_gprogram))
        self.g.pipes = <sc_gpipe *>self._array(self.g.max_pipes, sizeof(sc_gpipe))
        if self.g.swap_pages:
            self.g.swap = <u8 *>self._array(self.g.swap_pages, 4096)
            self.g.swap_count = <u32 *>self._array(self.g.swap_pages, sizeof(u32))
            self.g.swap_next = <u32 *>self._array(self.g.swap_pages, sizeof(u32))
            for i in range(self.g.swap_pages):
                self.g.swap_next[i] = i + 2 if i + 1 < self.g.swap_pages else 0
            self.g.swap_free = 1

    def _boot(self, options):
        cdef int rc
        cdef u32 cpu
        cdef int level = _DIRECT_MAPS[options.direct_map]
        if boot_tables(&self.g, level, options.global_) != RC_OK:
            raise GuestOutOfMemory(f"the guest's memory of {self.g.nframes << 12} bytes does not hold its kernel")
        rc = RC_OK
        for cpu in range(self.g.n_cpus):
            cpu_go(&self.g, cpu)
            if rc == RC_OK:
                rc = boot_registers(&self.g, options.global_)
        cpu_go(&self.g, 0)
        if rc == RC_GP:
            raise ConfigError("vm: its processor refuses the registers of a guest kernel; a fresh VM is needed")
        if rc != RC_OK:
            raise self._cpu.mmu.failure(rc)
        memset(&self.g.n, 0, sizeof(self.g.n))

    cdef int _ready(self) except -1:
        self._cpu.mmu.idle()
        if self._stopped is not None:
            raise GuestPanic(f"the guest has stopped: {self._stopped}")
        return 0

    cdef object _failure(self, int rc, object where):
        """What return code `rc` stands for, as an exception."""
        if rc == RC_BAD_OP:
            return ConfigError(f"{where}: the process has ended, or its number is in use")
        if rc == RC_NOMEM:
            return GuestOutOfMemory(f"{where}: no free frame in the guest's {self.g.nframes}")
        if rc == RC_NOROOM:
            return GuestOutOfMemory(f"{where}: no room in the address space, or over max_mappings={self.g.max_vmas}")
        if rc == RC_NOLOG:
            self._stopped = "the recording did not fit into the host's memory"
            return MemoryError(f"{where}: no memory for a recording of {self.g.log_length} operations")
        if rc == RC_SEGV:
            return ConfigError(f"{where}: not all of its range is mapped with the rights that it needs")
        if rc == RC_PANIC:
            self._stopped = "its tables or registers are not what it made them"
            return GuestPanic(f"{where}: {self._stopped}")
        error = self._cpu.mmu.failure(rc)
        if self._cpu.mmu.hook_error is not None:
            error, self._cpu.mmu.hook_error = self._cpu.mmu.hook_error, None
        self._stopped = str(error)
        return error

    @property
    def counters(self) -> dict:
        """What the kernel and its processes did since boot, by name (COUNTERS)."""
        cdef const u64 *counts = <const u64 *>&self.g.n
        return {name: counts[i] for i, name in enumerate(COUNTERS)}

    @property
    def history(self) -> int:
        """A checksum of all accesses, in order: gpa and value, table stores without A and D, refusals."""
        return self.g.history

    @property
    def frames(self) -> dict:
        """Frames of the guest's memory by use: total, of which free, tables, anonymous, cache, kernel, boot; and large
        pages, which are counted apart: large, of which large_free."""
        cdef u64 i
        cdef u64 found[8]
        memset(found, 0, sizeof(found))
        for i in range(1, self.g.nframes):
            if (i < self.g.fresh or i >= self.g.fresh_end) and not self.g.kind[i] & FRAME_WAS_TABLE:
                found[self.g.kind[i] & 7] += 1
        large = guest_span(&self.g, 2) >> 12
        use = {"total": self.g.nframes, "free": self.g.n_free, "large": (self.g.all_frames - self.g.nframes) // large,
               "large_free": self.g.n_large}
        use.update({name: found[kind] for kind, name in _KINDS.items()})
        use["boot"] += 1            # frame 0
        return use

    @property
    def swap_used(self) -> int:
        """Swap slots in use."""
        return sum(1 for i in range(self.g.swap_pages) if self.g.swap_count[i])

    def references(self):
        """uint32[frames]: how often each frame is counted as in use (a copy)."""
        out = np.zeros(self.g.all_frames, dtype=np.uint32)
        memcpy(<void *><size_t>out.ctypes.data, self.g.count, self.g.all_frames * sizeof(u32))
        return out

    @property
    def direct_map(self) -> int:
        """Linear address at which the kernel maps gpa 0."""
        return self.g.direct_map

    @property
    def task_size(self) -> int:
        """End of the user half of the address space."""
        return self.g.task_size

    def record(self, on=True) -> None:
        """Start, or stop, to write down every operation of the processor; see `recording`. Starting forgets the last.

        String instructions are then made store by store. 19 bytes an operation, in the host's memory.
        """
        self._ready()
        if on and self.g.n_cpus > 1:
            raise ConfigError(f"record: a recording is of one processor, and the guest has {self.g.n_cpus}")
        if on and not self.g.recording:
            self.g.log_length = 0
        self.g.recording = bool(on)

    @property
    def recording(self):
        """What was written down, an array of OP_DTYPE (a copy). `VCpu.run` repeats it on a VM that is in the state that
        this one was in when it began."""
        self._cpu.mmu.idle()
        out = np.zeros(self.g.log_length, dtype=_OP_DTYPE)
        if self.g.log_length:
            memcpy(<void *><size_t>out.ctypes.data, self.g.log, self.g.log_length * sizeof(sc_glog))
        return out

    def last_fault(self) -> int:
        """CR2 of the processor that worked last: the address of its last page fault."""
        return self.g.v.cr2
