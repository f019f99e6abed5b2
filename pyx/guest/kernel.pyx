"""A small guest kernel that runs on a VM: processes, memory, pipes; it edits its own page tables.

What it does is done by the VM's processors, one at a time, in guest memory: stores to tables and data through the
direct map, CR3 loads, INVLPG. See guest_options.KernelOptions for its settings, and docs/workloads.md for the concepts.
"""
import numpy as np

from libc.string cimport memcpy, memset

from shadowcore.engine.exits cimport exits_counted
from shadowcore.engine.types cimport RC_OK, u8, u16, u32, u64
from shadowcore.engine.watch cimport watch_due, watch_error
from shadowcore.guest.call cimport (
    BAD_AMID, BAD_CPU, BAD_FILE, BAD_FLAGS, BAD_NOTHING, BAD_OP, BAD_PIPE, BAD_PROCESS, BAD_PROGRAM, BAD_PROT,
    BAD_RANGE, BAD_SIZE, CALL_SPAWN, call_check, call_run, sc_call,
)
from shadowcore.guest.frames cimport frame_put
from shadowcore.guest.kernel_base cimport KernelBase
from shadowcore.guest.lifecycle cimport process_switch
from shadowcore.guest.state cimport (
    FILE_DISK, FILE_LARGE, FILE_ZERO, NO_PROCESS, PROCESS_ALIVE, PROCESS_ENDED, PROCESS_NONE, guest_span, sc_gproc,
    sc_gprogram, sc_guest, sc_gvma, vmas_of,
)
from shadowcore.guest.user cimport PROGRAM_MODIFY, user_array, user_program

from shadowcore.config import check_int
from shadowcore.errors import ConfigError, GuestOutOfMemory
from shadowcore.guest.kernel_base import COUNTERS
from shadowcore.guest.options import Call, File, Program
from shadowcore.guest.process import Process

CALL_DTYPE = np.dtype([
    ("op", "u1"), ("flags", "u1"), ("size", "u1"), ("prot", "u1"), ("process", "<u4"), ("addr", "<u8"),
    ("count", "<u8"), ("value", "<u8"),
])
MAPPING_DTYPE = np.dtype([
    ("start", "<u8"), ("end", "<u8"), ("page", "<u8"), ("file", "<u4"), ("prot", "<u2"), ("flags", "<u2"),
])
NO_PROGRAM = 0xFFFFFFFF
__all__ = ["CALL_DTYPE", "COUNTERS", "MAPPING_DTYPE", "NO_PROGRAM", "Kernel"]
assert CALL_DTYPE.itemsize == sizeof(sc_call)
assert MAPPING_DTYPE.itemsize == sizeof(sc_gvma)

cdef enum:
    BUDGET = 1 << 12                # accesses between two looks at the clock, see shadowcore.engine.watch

# Work that one call from Python brings: calls, or accesses. Each kind begins with an sc_work and has its own step.
cdef struct sc_work
ctypedef int (*sc_step)(sc_guest *g, sc_work *w) noexcept nogil

cdef struct sc_work:
    sc_step step                    # does some more, of at most BUDGET accesses; RC_OK, or why it failed
    u64 n                           # how many there are
    u64 at                          # how many are done
    int rc                          # RC_OK, or the code of the one that failed

cdef struct sc_calls:
    sc_work work
    const sc_call *calls
    u64 *results
    u64 within                      # accesses done of the call that is under way

cdef struct sc_user_accesses:
    sc_work work
    const u64 *addr
    const u8 *write                 # NULL: all are as `all_write`
    bint all_write
    const u64 *value
    u32 size
    u8 *outcome                     # results, or NULL
    u64 *loaded
    u64 *gpa
    u64 refused

cdef struct sc_user_program:
    sc_work work
    const u8 *op
    const u16 *size
    const u64 *addr
    u64 refused

cdef dict _WHY = {
    BAD_OP: "op", BAD_PROCESS: "process: no such number", BAD_SIZE: "size: not 1, 2, 4 or 8",
    BAD_RANGE: "addr, count, value: not whole pages of the user half, or too much",
    BAD_PROT: "prot: not a combination of READ, WRITE, EXEC", BAD_FILE: "value: no such file",
    BAD_PROGRAM: "value: no such program", BAD_PIPE: "value: no such pipe", BAD_FLAGS: "flags: no such combination",
    BAD_CPU: "value: no such processor",
    BAD_AMID: "value: as many operations, TOUCH and CPU, do not follow",
}


cdef int _step_calls(sc_guest *g, sc_work *w) noexcept nogil:
    cdef sc_calls *c = <sc_calls *>w
    return call_run(g, c.calls, w.n, &w.at, &c.within, BUDGET, c.results)


cdef int _step_accesses(sc_guest *g, sc_work *w) noexcept nogil:
    cdef sc_user_accesses *a = <sc_user_accesses *>w
    return user_array(g, a.addr, a.write, a.all_write, a.value, a.size, &w.at, min(w.n, w.at + BUDGET),
                      a.outcome, a.loaded, a.gpa, &a.refused)


cdef int _step_program(sc_guest *g, sc_work *w) noexcept nogil:
    cdef sc_user_program *p = <sc_user_program *>w
    return user_program(g, p.op, p.size, p.addr, &w.at, min(w.n, w.at + BUDGET), &p.refused)


cdef object _do(KernelBase kernel, sc_work *w, u32 process):
    """Do the work without the GIL, process number `process` first scheduled (NO_PROCESS: whoever is). Where w.rc is
    RC_OK: what ended it early, a signal or an audit, or None."""
    cdef sc_guest *g = &kernel.g
    w.at = 0
    w.rc = RC_OK
    error = None
    kernel._ready()                 # once more: others may have run since the arguments were looked at
    kernel._cpu.mmu.enter()
    exits_counted(g.mmu, &g.n.accesses, &g.n.kernel_accesses, &g.n.cr3_loads, &g.n.invlpg)
    try:
        if process != NO_PROCESS and (g.current != process or g.idle):
            w.rc = process_switch(g, process)
        while w.at < w.n and w.rc == RC_OK and error is None:
            with nogil:
                while w.at < w.n and w.rc == RC_OK and not g.mmu.audit_found:
                    w.rc = w.step(g, w)
                    if watch_due(g.mmu.watch):
                        break
            if w.rc == RC_OK:
                error = kernel._cpu.mmu.stopped()
    finally:
        exits_counted(g.mmu, NULL, NULL, NULL, NULL)
        kernel._cpu.mmu.leave()
    return error


cdef class Kernel(KernelBase):
    """A guest kernel, booted on a fresh VM with RAM from gpa 0. KernelOptions are its settings.

    counters: what it did. history: a checksum over every access (gpa, value) and every refusal, the same whatever the
    design of the VM. The first process comes from `spawn`, the others from it or from `fork`.

    A guest that runs out of frames raises GuestOutOfMemory and goes on. GuestPanic: its memory or registers are not
    what it made them (somebody else wrote there, or a sloppy kernel freed a frame that is still in use); like an error
    of the engine in the middle of a call it is the end of the guest.

    >>> kernel = sc.Kernel(sc.VM("16MiB"))
    >>> parent = kernel.spawn()
    >>> parent.switch()
    >>> heap = parent.mmap(4096)
    >>> parent.write(heap, 7)
    >>> child = parent.fork()
    >>> child.switch()
    >>> child.read(heap)
    7
    """

    def run(self, calls):
        """Carry out operations, an array of CALL_DTYPE, without the GIL; uint64 results, one each (see Call).

        ConfigError, before anything is done, for an operation that cannot be whatever the state; for one that the
        state forbids (a process that has ended), or GuestOutOfMemory, when its turn comes: those before it are done.
        Ctrl-C raises Interrupted. Errors that come in the middle have `.result`: the results of those that were done.
        """
        if isinstance(calls, np.ndarray):
            calls = np.asarray(calls)       # without what a subclass says of itself
        if not isinstance(calls, np.ndarray) or calls.dtype != CALL_DTYPE or calls.ndim != 1:
            raise ConfigError(f"calls: a one-dimensional array of CALL_DTYPE is needed, not {calls!r:.60}")
        # A copy: what was checked is what is done, whatever another thread does to the array meanwhile.
        calls = np.array(calls, dtype=CALL_DTYPE)
        results = np.zeros(len(calls), dtype=np.uint64)
        cdef u64 n = len(calls)
        cdef u64 i
        cdef sc_calls w
        cdef int rc = BAD_NOTHING
        if n == 0:
            return results
        cdef const sc_call *c = <const sc_call *><size_t>calls.ctypes.data
        self._ready()
        with nogil:
            for i in range(n):
                rc = call_check(&self.g, &c[i], n - 1 - i)
                if rc != BAD_NOTHING:
                    break
        if rc != BAD_NOTHING:
            raise ConfigError(f"calls[{i}]: {_WHY[rc]} (op {c[i].op})")
        w.work.step, w.work.n = _step_calls, n
        w.calls, w.results, w.within = c, <u64 *><size_t>results.ctypes.data, 0
        error = _do(self, &w.work, NO_PROCESS)
        if w.work.rc != RC_OK:
            error = self._failure(w.work.rc, f"calls[{w.work.at}], {Call(c[w.work.at].op).name.lower()}")
        if error is not None:
            raise watch_error(error, results[:w.work.at])
        return results

    def call(self, op, process=0, addr=0, count=0, value=0, *, flags=0, size=8, prot=0) -> int:
        """One operation; see Call for what it takes and returns."""
        number = check_int("op", op, 0, 255)
        one = np.zeros(1, dtype=CALL_DTYPE)
        one["op"] = number
        one["flags"] = check_int("flags", flags, 0, 255)
        one["size"] = check_int("size", size, 0, 255)
        one["prot"] = check_int("prot", prot, 0, 255)
        one["process"] = check_int("process", process, 0, NO_PROGRAM)
        one["addr"] = check_int("addr", addr, 0, (1 << 64) - 1)
        one["count"] = check_int("count", count, 0, (1 << 64) - 1)
        one["value"] = check_int("value", value, 0, (1 << 64) - 1)
        return int(self.run(one)[0])

    def free_number(self) -> int:
        """The number that the next process gets. GuestOutOfMemory if there are max_processes."""
        cdef u32 p
        ended = None
        for p in range(self.g.max_procs):
            if self.g.procs[p].state == PROCESS_NONE:
                return p
            if self.g.procs[p].state == PROCESS_ENDED:
                ended = p
        if ended is None:
            raise GuestOutOfMemory(f"max_processes: all {self.g.max_procs} processes are alive")
        return ended

    def spawn(self, program=None):
        """A new process, of a program, or with nothing but a stack."""
        number = self.free_number()
        self.call(CALL_SPAWN, number, value=self._program(program))
        return Process(self, number)

    def _program(self, program):
        if program is None:
            return NO_PROGRAM       # NO_PROCESS in calls
        if not isinstance(program, Program):
            raise ConfigError(f"program: a Program or None is needed, not {program!r:.60}")
        if not self.g.n_programs:
            raise ConfigError(f"program: a Program of this kernel is needed, not {program!r:.60}")
        return check_int("program: number", program.number, 0, <int>self.g.n_programs - 1)

    def switch(self, process) -> None:
        """Schedule a process; None: nobody runs, and the root that is loaded stays (lazy TLB)."""
        if process is None:
            self.call(Call.IDLE)
        elif isinstance(process, Process):
            process.switch()
        else:
            raise ConfigError(f"process: a Process or None is needed, not {process!r:.60}")

    def file(self, pages, zero=False, large=False):
        """A file of `pages` pages of 4096 bytes; zero: shared memory, whose pages begin as zeros; large: shared memory
        in large pages (options.large_pages), always mapped shared.

        The others hold numbers: word i of page n is bijection((file + 1) << 40 | n << 9 | i), see guest_mix.
        """
        self._ready()
        count = check_int("pages", pages, 1, self.g.cache_size)
        span = guest_span(&self.g, 2) >> 12
        if large and count % span:
            raise ConfigError(f"pages: {count} is not a multiple of {span}, the pages of a large one")
        if self.g.n_files == self.g.max_files:
            raise ConfigError(f"max_files: there are {self.g.max_files} files already")
        if self.g.cache_used + <u64>count > self.g.cache_size:
            raise ConfigError(f"max_file_pages: {self.g.cache_used} of {self.g.cache_size} are in use, {count} wanted")
        number = self.g.n_files
        self.g.file_first[number] = self.g.cache_used
        self.g.file_pages[number] = count
        self.g.file_kind[number] = FILE_LARGE if large else FILE_ZERO if zero else FILE_DISK
        self.g.cache_used += <u64>count
        self.g.n_files += 1
        return File(number, count, bool(zero or large), bool(large))

    def discard(self, file) -> int:
        """Free the cached pages of a file that nobody maps; what was written to them is lost. How many there were."""
        self._ready()
        cdef u32 number = self._file(file)
        cdef u64 first = self.g.file_first[number]
        cdef u64 i
        freed = 0
        for i in range(first, first + self.g.file_pages[number]):
            if self.g.cache[i] and self.g.count[self.g.cache[i]] == 1:
                frame_put(&self.g, self.g.cache[i])
                self.g.cache[i] = 0
                freed += 1
        return freed

    def _file(self, file):
        if not isinstance(file, File) or not self.g.n_files:
            raise ConfigError(f"file: a File of this kernel is needed, not {file!r:.60}")
        return check_int("file: number", file.number, 0, <int>self.g.n_files - 1)

    def program(self, text=64, data=16, bss=16, library=None):
        """A program: pages of code, of initialized data, of zeroed data; library: another program, mapped as well."""
        self._ready()
        pages = check_int("text", text, 1, 1 << 14)
        initialized = check_int("data", data, 0, 1 << 14)
        zeroed = check_int("bss", bss, 0, 1 << 14)
        if library is not None:
            library = self._program(library)
        if self.g.n_programs == self.g.max_programs:
            raise ConfigError(f"max_programs: there are {self.g.max_programs} programs already")
        cdef sc_gprogram *made = &self.g.programs[self.g.n_programs]
        cdef sc_gprogram *shared
        file = self.file(pages + initialized)
        made.text = file.number + 1
        made.text_pages = pages
        made.data_pages = initialized
        made.bss_pages = zeroed
        made.library = 0
        if library is not None:
            shared = &self.g.programs[<u32>library]
            made.library = shared.text
            made.library_pages = shared.text_pages
            made.library_data = shared.data_pages
        self.g.n_programs += 1
        return Program(self.g.n_programs - 1, pages, initialized, zeroed)

    def pipe(self) -> int:
        """A pipe of 16 pages; its number."""
        self._ready()
        if self.g.n_pipes == self.g.max_pipes:
            raise ConfigError(f"max_pipes: there are {self.g.max_pipes} pipes already")
        self.g.n_pipes += 1
        return self.g.n_pipes - 1

    @property
    def processes(self) -> list:
        """Those that are alive, by number."""
        return [Process(self, p) for p in range(self.g.max_procs) if self.g.procs[p].state == PROCESS_ALIVE]

    @property
    def current(self):
        """The process that is scheduled, or None."""
        if self.g.current == NO_PROCESS or self.g.idle or self.g.procs[self.g.current].state != PROCESS_ALIVE:
            return None
        return Process(self, self.g.current)

    def state_of(self, number, generation) -> dict:
        """What the kernel knows of a process; ConfigError if that life of the number is over."""
        cdef u32 p = check_int("process", number, 0, self.g.max_procs - 1)
        cdef sc_gproc *process = &self.g.procs[p]
        if process.state != PROCESS_ALIVE or process.generation != generation:
            raise ConfigError(f"process: number {number} has ended")
        mappings = np.zeros(process.nvmas, dtype=MAPPING_DTYPE)
        if process.nvmas:
            memcpy(<void *><size_t>mappings.ctypes.data, vmas_of(&self.g, p), process.nvmas * sizeof(sc_gvma))
        return {"root": process.root, "user_root": process.user_root, "brk": process.brk,
                "brk_start": process.brk_start, "resident": process.resident, "swapped": process.swapped,
                "tables": process.tables, "mappings": mappings}

    def generation_of(self, number) -> int:
        """Which life of a process number this is."""
        cdef u32 p = check_int("process", number, 0, self.g.max_procs - 1)
        return self.g.procs[p].generation

    def access(self, number, addresses, write, values, size, results):
        """User accesses of a process; see Process.touch and Process.access. Number of refusals, or arrays."""
        cdef u32 p = check_int("process", number, 0, self.g.max_procs - 1)
        addr = _words("addresses", addresses, None)
        cdef u64 n = len(addr)
        cdef u32 c_size = check_int("size", size, 1, 8)
        if c_size not in (1, 2, 4, 8):
            raise ConfigError(f"size: {size!r} is not 1, 2, 4 or 8")
        self._ready()
        if self.g.procs[p].state != PROCESS_ALIVE:
            raise ConfigError(f"process: number {number} has ended")
        cdef sc_user_accesses w
        memset(&w, 0, sizeof(w))
        w.work.step, w.work.n = _step_accesses, n
        w.addr = <const u64 *><size_t>addr.ctypes.data
        w.size = c_size
        if isinstance(write, (bool, np.bool_)):
            w.all_write = bool(write)
        else:
            write = np.ascontiguousarray(write)
            if write.dtype not in (np.bool_, np.uint8) or write.shape != addr.shape:
                raise ConfigError(f"write: a bool, or an array of {n} of them, is needed, not {write!r:.60}")
            write = write.view(np.uint8).copy()
            w.write = <const u8 *><size_t>write.ctypes.data
        if values is not None:
            values = _words("values", values, n)
            w.value = <const u64 *><size_t>values.ctypes.data
        outcome = loaded = gpa = None
        if results:
            outcome = np.zeros(n, dtype=np.uint8)
            loaded = np.zeros(n, dtype=np.uint64)
            gpa = np.zeros(n, dtype=np.uint64)
            w.outcome = <u8 *><size_t>outcome.ctypes.data
            w.loaded = <u64 *><size_t>loaded.ctypes.data
            w.gpa = <u64 *><size_t>gpa.ctypes.data
        error = _do(self, &w.work, p)
        cdef u64 at = w.work.at
        if w.work.rc != RC_OK:
            error = self._failure(w.work.rc, "access")
        if error is not None:
            raise watch_error(error, (outcome[:at], loaded[:at], gpa[:at]) if results else w.refused)
        return (outcome, loaded, gpa) if results else w.refused

    def replay(self, number, op, size, addr) -> int:
        """Accesses of process `number` as a recording of a program has them: arrays of op (uint8), size (uint16) and
        addr (uint64) of one length. How many were refused; each ends there."""
        cdef u32 p = check_int("process", number, 0, self.g.max_procs - 1)
        ops = np.array(op, dtype=np.uint8, order="C")
        sizes = np.array(size, dtype=np.uint16, order="C")
        addrs = np.array(addr, dtype=np.uint64, order="C")
        if ops.ndim != 1 or not ops.shape == sizes.shape == addrs.shape:
            raise ConfigError("op, size, addr: arrays of one dimension and one length are needed")
        cdef u64 n = len(ops)
        self._ready()
        if self.g.procs[p].state != PROCESS_ALIVE:
            raise ConfigError(f"process: number {number} has ended")
        if n and ops.max() > PROGRAM_MODIFY:
            raise ConfigError(f"op: {ops.max()} is none of 0 to {PROGRAM_MODIFY}")
        cdef sc_user_program w
        w.work.step, w.work.n = _step_program, n
        w.op = <const u8 *><size_t>ops.ctypes.data
        w.size = <const u16 *><size_t>sizes.ctypes.data
        w.addr = <const u64 *><size_t>addrs.ctypes.data
        w.refused = 0
        error = _do(self, &w.work, p)
        if w.work.rc != RC_OK:
            error = self._failure(w.work.rc, "replay")
        if error is not None:
            raise watch_error(error, w.refused)
        return w.refused

    def __repr__(self):
        return (f"Kernel(mode {self.options.mode}, {self.g.n_alive} processes, {self.g.n_free} of {self.g.nframes} "
                "frames free)")


def _words(name, values, length):
    """`values` as a contiguous uint64 array of our own."""
    array = np.asarray(values)
    if array.ndim == 0 and length is not None and array.dtype.kind in "iu":
        array = np.full(length, array)
    if array.ndim != 1 or array.dtype.kind not in "iu" and array.size:
        raise ConfigError(f"{name}: a one-dimensional array of integers is needed, not {values!r:.60}")
    if length is not None and len(array) != length:
        raise ConfigError(f"{name}: {length} of them are needed, not {len(array)}")
    if array.size and array.dtype.kind == "i" and array.min() < 0:
        raise ConfigError(f"{name}: {array.min()} is negative")
    return np.array(array, dtype=np.uint64, order="C")
