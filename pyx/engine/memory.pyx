"""Memory: guest RAM as one flat array (ours, lazily committed, or the caller's), its slots and dirty logs."""
import contextlib
import mmap
import sys

import numpy as np

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from shadowcore.engine.held cimport held_owners
from shadowcore.engine.memory cimport (
    SC_MAX_SLOTS, SC_POOL_HFN, SC_RAM_ALIGN, SC_RUNNING, SC_WRITTEN, mem_frame, sc_no_frame,
)
from shadowcore.engine.types cimport u8, u32, u64

from shadowcore.config import HOST_PAGES as _HOST_PAGES, MemorySlot, check_bool, check_int, parse_size, taken
from shadowcore.errors import ConfigError, EngineError


cdef enum:
    HUGE_PAGE = 1 << 21             # bytes of a large page of the host


cdef class _Zeroed:
    """Bytes that belong to no array: whoever has one can resize it."""
    cdef void *at
    cdef Py_ssize_t size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.at, self.size, 0, flags)

    def __dealloc__(self):
        free(self.at)


cdef _Zeroed _zeroed(size_t nbytes):
    cdef _Zeroed bytes_ = _Zeroed.__new__(_Zeroed)
    bytes_.at = calloc(nbytes, 1)
    if bytes_.at == NULL:
        raise MemoryError(f"cannot allocate {nbytes} bytes")
    bytes_.size = nbytes
    return bytes_


def allocate(nbytes, huge=False):
    """A zeroed uint8 array of `nbytes` whose pages the host commits when they are first touched.

    huge: commit pages of 2 MiB where the host has them and the array fills them. For arrays that are used from their
    start on: one byte touched anywhere commits all of its page.
    """
    if sys.platform == "win32":
        return np.frombuffer(_zeroed(nbytes), dtype=np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= getattr(mmap, "MAP_NORESERVE", 0x4000)
    huge = huge and nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    try:
        mapping = mmap.mmap(-1, nbytes + (HUGE_PAGE if huge else 0), flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"cannot reserve {nbytes} bytes of address space: {error}") from None
    array = np.frombuffer(mapping, dtype=np.uint8)
    if not huge:
        return array
    first = -array.ctypes.data % HUGE_PAGE
    # What is left at the end keeps small pages.
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE, first, nbytes // HUGE_PAGE * HUGE_PAGE)
    return array[first : first + nbytes]


cdef u8 *_pointer(object array) except NULL:
    return <u8 *><size_t>array.ctypes.data


cdef class _Window:
    """An array of the engine as a buffer for others: read-only, or lent for writing by `lender`.

    Whoever can write to it holds one of its buffers, and `lent` counts those; from the first on the shadow structure
    passes for written, until it has been checked.
    """
    cdef object array
    cdef Memory lender              # None: read-only

    def __cinit__(self, array, Memory lender):
        self.array = array
        self.lender = lender

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.lender is not None and self.lender.mem.busy & SC_RUNNING:
            raise BufferError("this VM is in use: its tables cannot be written now")
        PyBuffer_FillInfo(view, self, _pointer(self.array), self.array.nbytes, self.lender is None, flags)
        if self.lender is not None:
            self.lender.mem.lent += 1
            self.lender.mem.busy |= SC_WRITTEN

    def __releasebuffer__(self, Py_buffer *view):
        if self.lender is not None:
            self.lender.mem.lent -= 1


def window(array, lender=None):
    """uint8: the bytes of `array`, sharing memory: read-only for good, or with a `lender` (Memory) to be written to."""
    return np.frombuffer(_Window(array, lender), dtype=np.uint8)


cdef class Memory:
    """Guest RAM and the host physical space it lies in.

    memory: bytes (int, or text such as "64MiB") | uint8 array, used in place | list of MemorySlot.
    slots: with an array, the MemorySlots that map it, one after the other (default: one slot at gpa 0).
    host_page_size: of that one slot.
    """

    def __cinit__(self, memory, slots=None, host_page_size=None):
        memset(&self.mem, 0, sizeof(self.mem))
        if isinstance(memory, (list, tuple)):
            if slots is not None:
                raise ConfigError("slots: given twice, in memory and in slots")
            slots, memory = memory, None
        if slots is not None:
            slots = checked_slots(slots)
            if memory is None:
                memory = sum(slot.size for slot in slots)
        if isinstance(memory, np.ndarray):
            ram = _checked_array(np.asarray(memory))    # without what a subclass says of itself
        elif isinstance(memory, (int, str, np.integer)) and not isinstance(memory, bool):
            ram = allocate(parse_size(memory))
        else:
            raise ConfigError("memory: bytes (int), a text such as '64MiB', a uint8 array or a list of MemorySlot "
                              f"is needed, not {type(memory).__name__}")
        if slots is None:
            slots = (MemorySlot(0, ram.size, host_page_size=4096 if host_page_size is None else host_page_size),)
        elif host_page_size is not None:
            raise ConfigError("host_page_size: each of the memory slots says it for itself")
        if sum(slot.size for slot in slots) != ram.size:
            raise ConfigError(f"slots: they hold {sum(slot.size for slot in slots)} bytes, the memory {ram.size}")
        # A buffer keeps most owners from moving their bytes; numpy's refcheck=False is held off by a weak reference.
        self._views = [memoryview(ram), *held_owners(ram)]
        self._logs = {}
        self.bytes = ram
        self.words = ram.view(np.uint64)
        self.tables = None
        self.slots = slots
        self.on_log = None
        self.mem.ram = _pointer(ram)
        self.mem.nframes = ram.size >> 12
        self.mem.ram_hfn = SC_RAM_ALIGN
        self.mem.nslots = len(slots)
        cdef u64 frame = 0
        for i, slot in enumerate(slots):
            self.mem.slots[i].base_gfn = slot.gpa >> 12
            self.mem.slots[i].npages = slot.size >> 12
            self.mem.slots[i].frame = frame
            self.mem.slots[i].host_level = _HOST_PAGES.index(slot.host_page_size) + 1
            frame += <u64>(slot.size >> 12)
        self.mem.low_frames = 0 if slots[0].gpa else slots[0].size >> 12
        for i, slot in enumerate(slots):
            if slot.dirty_log:
                self.start_dirty_log(i)

    def attach_pool(self, pages):
        """Lay the shadow pool of `pages` frames below guest RAM in host physical space. Called by the MMU, once."""
        if self.tables is not None:
            raise ConfigError("memory: it already belongs to a VM with a shadow MMU")
        pool = allocate(pages << 12, huge=True)
        self._views.append(memoryview(pool))
        self.tables = pool.view(np.uint64).reshape(pages, 512)
        self.mem.pool = <u64 *>_pointer(pool)
        self.mem.pool_pages = pages
        self.mem.ram_hfn = (SC_POOL_HFN + pages + SC_RAM_ALIGN - 1) // SC_RAM_ALIGN * SC_RAM_ALIGN

    @property
    def ram_hpa(self) -> int:
        """Host physical address of the first byte of guest RAM."""
        return self.mem.ram_hfn << 12

    @property
    def pool(self):
        """uint64[pool_pages, 512]: the shadow tables, live and read-only; None without a shadow MMU.

        `vm.mmu.writable_arrays` gives them for writing.
        """
        return None if self.tables is None else window(self.tables).view(np.uint64).reshape(-1, 512)

    @property
    def pool_hpa(self) -> int:
        """Host physical address of the first byte of the shadow pool."""
        return SC_POOL_HFN << 12

    def frame(self, gfn) -> int:
        """Index in guest RAM (4096-byte frames) of the frame behind `gfn`; ConfigError when it is in no slot."""
        cdef u64 frame = mem_frame(&self.mem, check_int("gfn", gfn, 0, (1 << 52) - 1))
        if frame == sc_no_frame():
            raise ConfigError(f"gfn: {gfn:#x} is in no memory slot")
        return frame

    def start_dirty_log(self, slot=0, initially_set=False) -> None:
        """Log, from now on, the frames of `slot` that are written (by the guest, its walks, or devices).

        initially_set: all frames count as written, and none is write-protected before its bit is cleared
        (KVM_DIRTY_LOG_INITIALLY_SET).
        """
        self._idle()
        index = check_int("slot", slot, 0, <int>self.mem.nslots - 1)
        if index not in self._logs:
            frames = self.mem.slots[<u32>index].npages
            log = allocate(((frames + 63) >> 6) * 8).view(np.uint64)
            if check_bool("initially_set", initially_set):
                log[:] = 0xFFFFFFFFFFFFFFFF
                if frames & 63:
                    log[-1] = (1 << (frames & 63)) - 1
                self._changed(index, "set")
            else:
                self._changed(index, "start")   # first: it may refuse
            self._logs[index] = log
            self.mem.slots[index].dirty = <u64 *>_pointer(log)
            self.mem.logging = True

    def stop_dirty_log(self, slot=0) -> None:
        """Stop logging `slot` and forget its log."""
        index = self._logged(slot)
        self.mem.slots[index].dirty = NULL
        log = self._logs.pop(index)
        self.mem.logging = bool(self._logs)
        self._changed(index, "stop")
        del log

    def dirty_log(self, slot=0):
        """bool[frames of the slot]: True for each frame written since the log was started or cleared."""
        index = self._logged(slot)
        bits = np.unpackbits(self._logs[index].view(np.uint8), bitorder="little")
        return bits[: self.mem.slots[<u32>index].npages].astype(bool)

    def clear_dirty_log(self, slot=0, first=0, frames=None) -> None:
        """Clear the log of `slot`, or of so many frames of it from `first` on; they are write-protected again so that
        the next store is seen. (Under `unsync` those that the log showed; else all of the slot.)"""
        index = self._logged(slot)
        cdef u64 n = self.mem.slots[<u32>index].npages
        cdef u64 begin = check_int("first", first, 0, n)
        cdef u64 count = n - begin if frames is None else check_int("frames", frames, 0, n - begin)
        self._changed(index, "clear", begin, count)     # first: it may refuse
        if count == n:
            self._logs[index][:] = 0
            return
        bits = np.unpackbits(self._logs[index].view(np.uint8), bitorder="little")
        bits[begin:begin + count] = 0
        self._logs[index][:] = np.packbits(bits, bitorder="little").view(np.uint64)

    @property
    def logged_slots(self) -> tuple:
        """Numbers of the slots with a dirty log."""
        return tuple(sorted(self._logs))

    def dirty_words(self, slot=0):
        """uint64: the log of `slot` itself, one bit a frame, sharing memory."""
        return self._logs[self._logged(slot)][:]

    def _idle(self):
        if self.mem.busy & SC_RUNNING:
            raise EngineError("this VM is in use, by a batch in another thread or by the callback that makes this call")

    def _logged(self, slot):
        self._idle()
        index = check_int("slot", slot, 0, <int>self.mem.nslots - 1)
        if index not in self._logs:
            raise ConfigError(f"slot: {index} is not logged; start_dirty_log({index}) starts a log")
        return index

    def _changed(self, slot, what, first=0, frames=0):
        """The dirty log of `slot` begins ("start", or "set": every frame counts as written), ends ("stop"), or is
        cleared for some frames ("clear")."""
        if self.on_log is not None:
            self.on_log(slot, what, first, frames)

    def __repr__(self):
        return f"Memory({self.bytes.size >> 20} MiB, {len(self.slots)} slot(s))"


def checked_slots(slots):
    """The slots as a tuple; ConfigError unless they are MemorySlots that ascend, and no two overlap."""
    cdef list checked = []
    slots = tuple(slots)
    if not 1 <= len(slots) <= SC_MAX_SLOTS:
        raise ConfigError(f"memory slots: 1 to {SC_MAX_SLOTS} are allowed, not {len(slots)}")
    end = 0
    for slot in slots:
        slot = taken(MemorySlot, slot, "memory slots")
        if slot.gpa < end:
            raise ConfigError(f"memory slots: the slot at {slot.gpa:#x} overlaps or precedes the one before it")
        end = slot.gpa + slot.size
        if end > 1 << 52:
            raise ConfigError(f"memory slots: the slot at {slot.gpa:#x} ends beyond 52 address bits")
        checked.append(slot)
    return tuple(checked)


cdef object _checked_array(object array):
    if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
        raise ConfigError(f"memory: a contiguous one-dimensional uint8 array is needed, not {array.dtype}"
                          f"{list(array.shape)}")
    if not array.flags.writeable:
        raise ConfigError("memory: the array is read-only")
    if array.size == 0 or array.size % 4096:
        raise ConfigError(f"memory: {array.size} bytes is not a positive multiple of 4096")
    if array.ctypes.data % 8:
        raise ConfigError("memory: the array is not aligned to 8 bytes")
    return array
