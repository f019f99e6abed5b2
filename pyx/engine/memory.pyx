"""Memory: guest RAM as one flat array (ours, lazily committed, or the caller's), its slots, dirty logs and backing.

Past 500 lines, for it is one class, which owns what the engine works on.
"""
import contextlib
import mmap
import sys

import numpy as np

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from shadowcore.engine.backing cimport (
    BLOCK_HUGE, BLOCK_LARGE, BLOCK_NOTHING, BLOCK_TABLE, HOST_ABSENT, HOST_AWAY, HOST_OWN, host_is_sound, sc_backing,
)
from shadowcore.engine.held cimport held_owners
from shadowcore.engine.memory cimport (
    SC_MAX_SLOTS, SC_POOL_HFN, SC_RAM_ALIGN, SC_RUNNING, SC_WRITTEN, mem_frame, sc_no_frame,
)
from shadowcore.engine.types cimport u8, u32, u64

from shadowcore.config import (
    HOST_PAGES as _HOST_PAGES, MemorySlot, check_backing, check_bool, check_int, parse_size, taken,
)
from shadowcore.engine.slots import MAX_SLOTS as _MAX_SLOTS, check_place, checked_slots, free_place, offsets
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


cdef u64 _uncounted = 0
assert _MAX_SLOTS == SC_MAX_SLOTS


cdef void _nobody(void *context, u64 frame, u64 n) noexcept nogil:
    """No MMU is there yet."""


cdef class Memory:
    """Guest RAM and the host physical space it lies in.

    memory: bytes (int, or text such as "64MiB") | uint8 array, used in place | list of MemorySlot.
    slots: the MemorySlots that map it, one after the other (default: one slot at gpa 0); None in the list leaves a
        number free. What none of them maps is free for slots that are added later.
    host_page_size: of that one slot.
    backing: of the slots that do not say it for themselves, and of what is free.
    outer_backing: what an outer host has, where the host is a guest itself.

    >>> memory = sc.VM("16MiB").memory
    >>> memory.words[0x1000 // 8] = 7
    >>> int(memory.bytes[0x1000])
    7
    """

    def __cinit__(self, memory, slots=None, host_page_size=None, backing="warm", outer_backing="warm"):
        memset(&self.mem, 0, sizeof(self.mem))
        memset(&self.backing, 0, sizeof(self.backing))
        backing = check_backing("backing", backing)
        outer_backing = check_backing("outer_backing", outer_backing)
        if isinstance(memory, (list, tuple)):
            if slots is not None:
                raise ConfigError("slots: given twice, in memory and in slots")
            slots, memory = memory, None
        if slots is not None:
            slots = checked_slots(slots)
            if memory is None:
                memory = max([first + slot.size for first, slot in zip(offsets(slots), slots, strict=True) if slot],
                             default=0)
        given = isinstance(memory, np.ndarray)
        if given:
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
        places = offsets(slots)
        for first, slot in zip(places, slots, strict=True):
            if slot and first + slot.size > ram.size:
                raise ConfigError(f"slots: they hold {first + slot.size} bytes, the memory {ram.size}")
        # A buffer keeps most owners from moving their bytes; numpy's refcheck=False is held off by a weak reference.
        self._views = [memoryview(ram), *held_owners(ram)]
        self._logs = {}
        self.bytes = ram
        self.words = ram.view(np.uint64)
        self.tables = None
        self.slots = ()
        self.on_log = self.on_slots = self.on_backing = None
        self._backed = self._outer = None
        self.mem.ram = _pointer(ram)
        self.mem.nframes = ram.size >> 12
        self.mem.ram_hfn = SC_RAM_ALIGN
        for number, slot in enumerate(slots):
            if slot:
                self._place(number, slot, places[number] >> 12)
        if backing != "warm" or any(slot and slot.backing not in (None, "warm") for slot in slots):
            self._back(backing, given)
        if outer_backing != "warm":
            if self._backed is None:
                raise ConfigError(f"outer_backing: {outer_backing!r} contradicts backing: {backing!r}: what the host "
                                  "has it has touched, so that the outer host has it too")
            self._back_outer((self._backed[0] != HOST_ABSENT).view(np.uint8), outer_backing == "thp")
        for number, slot in enumerate(slots):
            if slot and slot.dirty_log:
                self.start_dirty_log(number)

    cdef int _place(self, int number, slot, u64 frame) except -1:
        """Slot `number`, free so far, is `slot`, with frames from `frame` on."""
        cdef sc_slot *at = &self.mem.slots[number]
        at.base_gfn = slot.gpa >> 12
        at.npages = slot.size >> 12
        at.frame = frame
        at.host_level = _HOST_PAGES.index(slot.host_page_size) + 1
        at.dirty = NULL
        at.read_only = slot.read_only
        self._settled(number, slot)
        return 0

    cdef int _settled(self, int number, slot) except -1:
        """What follows from slots as they are now; slot: of `number`, or None."""
        cdef int i
        cdef list slots = [*self.slots, *[None] * (number + 1 - len(self.slots))]
        slots[number] = slot
        self.mem.nslots = max([i + 1 for i, each in enumerate(slots) if each is not None], default=0)
        self.slots = tuple(slots[:self.mem.nslots])
        self.mem.low_frames = 0
        if self.mem.slots[0].base_gfn == 0 and self.mem.slots[0].frame == 0:
            self.mem.low_frames = self.mem.slots[0].npages
        self.mem.special = self.mem.host != NULL
        for i in range(self.mem.nslots):
            self.mem.special |= self.mem.slots[i].npages and self.mem.slots[i].read_only
        self.mem.logging = bool(self._logs)
        return 0

    def back(self) -> None:
        """From now on it is known which frames the host has; all of them, if that was not asked before."""
        self._idle()
        if self._backed is None:
            self._back()

    def _back(self, kind="warm", given=False) -> None:
        """From now on it is known which frames the host has: all of them, but for what `kind`, and of the slots each
        for its own part, says. given: there may be something in them."""
        frames = allocate(self.mem.nframes)
        blocks = allocate((self.mem.nframes + 511) >> 9)
        self._backed = frames, blocks
        self.backing.frame = _pointer(frames)
        self.backing.block = _pointer(blocks)
        self.backing.nframes = self.mem.nframes
        self.backing.withdrawn = _nobody
        self.backing.faults = self.backing.faults_large = &_uncounted
        self.backing.outer_faults = self.backing.outer_large = &_uncounted
        self._fill(0, self.mem.nframes, kind, 1, given)
        for number, slot in enumerate(self.slots):
            if slot:
                self._fill(self.mem.slots[<int>number].frame, self.mem.slots[<int>number].npages, slot.backing or kind,
                           self.mem.slots[<int>number].host_level, given)
        self.mem.host = &self.backing
        self.mem.special = True
        if self.on_backing is not None:
            self.on_backing()

    cdef int _back_outer(self, has, bint huge) except -1:
        """From now on it is known which frames the outer host has: those where `has` is 1."""
        self._outer = allocate(self.mem.nframes)
        self._outer[:] = has
        self.backing.outer = _pointer(self._outer)
        self.backing.outer_huge = huge
        return 0

    cdef int _fill(self, u64 first, u64 n, kind, int level, bint given) except -1:
        """n frames from `first` on are backed as `kind` says, by host pages of `level` where that is "warm"."""
        cdef bint huge = kind == "thp" or (kind == "warm" and level > 1)
        cdef u64 block, begin, end
        frames, blocks = self._backed
        end = first + n
        if kind == "warm":
            frames[first:end] = HOST_OWN
            if self._outer is not None:
                self._outer[first:end] = 1
        else:
            frames[first:end] = HOST_ABSENT
            if given:
                used = self.words.reshape(-1, 512)[first:end].any(axis=1)
                frames[first:end][used] = HOST_AWAY
        for block in range(first >> 9, (end + 511) >> 9):
            begin = block << 9
            if begin < first or begin + 512 > end:
                blocks[block] = BLOCK_TABLE         # shared with others, or cut off by the end of RAM
            elif kind == "warm":
                blocks[block] = BLOCK_HUGE | BLOCK_LARGE if huge else BLOCK_TABLE
            elif frames[begin:begin + 512].any():
                blocks[block] = BLOCK_TABLE
            else:
                blocks[block] = BLOCK_HUGE | BLOCK_NOTHING if huge else BLOCK_NOTHING
        return 0

    def backing_arrays(self) -> tuple:
        """(uint8 per frame of RAM, uint8 per 512 frames): what the host has, read-only; empty while that is all.

        Of a frame: 0 absent, 1 elsewhere, 2 the zero page, 3 a page of its own. Of a block: 0 no page table, 1 small
        entries, 2 a large one; beside that 4, where a first touch of nothing makes 2 MiB. Where there is an outer host:
        of a frame beside that 4, and 8 if that host has it; of a block 8, where a first touch makes 2 MiB there.
        """
        if self._backed is None:
            return ()
        if self._outer is None:
            return tuple(window(array) for array in self._backed)
        frames, blocks = self._backed
        return frames | 4 | self._outer << 3, blocks | (8 if self.backing.outer_huge else 0)

    def import_backing(self, arrays) -> None:
        """Put back what backing_arrays gave. ConfigError, and nothing changed, where that is no state of a host."""
        cdef sc_backing trial
        self._idle()
        frames, blocks = [np.array(array, dtype=np.uint8) for array in arrays]
        if frames.shape != (self.mem.nframes,) or blocks.shape != ((self.mem.nframes + 511) >> 9,):
            raise ConfigError("backing: a number for each frame and for each block of RAM is needed")
        outer, has, huge = frames & 4, frames >> 3, blocks >> 3
        frames &= 3
        blocks &= 7
        if np.any(outer != outer[0]) or np.any(huge != huge[0]) or has.max() > 1 or huge[0] > 1:
            raise ConfigError("backing: an outer host of all frames, or of none, is needed")
        if np.any(has < (frames == HOST_OWN)) if outer[0] else has.any() or huge[0]:
            raise ConfigError("backing: an outer host that has what the inner one has is needed")
        trial.frame, trial.block, trial.nframes = _pointer(frames), _pointer(blocks), self.mem.nframes
        if not host_is_sound(&trial):
            raise ConfigError("backing: frames and blocks that a host can have are needed")
        self.back()
        self._backed[0][:] = frames
        self._backed[1][:] = blocks
        if outer[0]:
            self._back_outer(has, huge[0])

    def add_slot(self, slot, number=None) -> int:
        """Map free frames of guest RAM, from now on, as `slot` (MemorySlot) says; its number, the lowest that is free
        unless it is given. See VM.add_slot."""
        self._idle()
        slot = taken(MemorySlot, slot, "slot")
        cdef int at = self._free_number() if number is None else check_int("slot", number, 0, SC_MAX_SLOTS - 1)
        if self._has(at):
            raise ConfigError(f"slot: number {at} is in use")
        check_place(self.slots, at, slot)
        cdef u64 frame = free_place(self._used(), self.mem.nframes, slot)
        fills = slot.backing is not None and (slot.backing != "warm" or self._backed is not None)
        self._tell("adding", at, slot)              # first: it may refuse
        if fills:
            self.back()
            self._fill(frame, slot.size >> 12, slot.backing, _HOST_PAGES.index(slot.host_page_size) + 1, True)
        self._place(at, MemorySlot(slot.gpa, slot.size, slot.dirty_log, slot.host_page_size, int(frame) << 12,
                                   slot.read_only, slot.backing), frame)
        self._tell("added", at, slot)
        if slot.dirty_log:
            self._log(at, False)
        return at

    def remove_slot(self, slot) -> None:
        """Unmap a slot; its number and frames are free. See VM.remove_slot."""
        cdef int at = self._slot(slot)
        self._tell("removing", at, self.slots[at])
        self._logs.pop(at, None)
        memset(&self.mem.slots[at], 0, sizeof(self.mem.slots[at]))
        gone = self.slots[at]
        self._settled(at, None)
        self._tell("removed", at, gone)

    def move_slot(self, slot, gpa) -> None:
        """Map the frames of a slot at another guest physical address. See VM.set_slot."""
        cdef int at = self._slot(slot)
        old = self.slots[at]
        new = MemorySlot(gpa, old.size, old.dirty_log, old.host_page_size, old.offset, old.read_only, old.backing)
        check_place(self.slots, at, new)
        if new.gpa == old.gpa:
            return
        self._tell("moving", at, old)
        self.mem.slots[at].base_gfn = new.gpa >> 12
        self._settled(at, new)
        self._tell("moved", at, new)

    cdef bint _has(self, int number):
        return number < self.mem.nslots and self.mem.slots[number].npages != 0

    def slot_number(self, slot) -> int:
        """`slot`, if it is the number of a memory slot; else ConfigError."""
        return self._slot(slot)

    cdef int _slot(self, slot) except -1:
        """The number of a slot that there is."""
        self._idle()
        number = check_int("slot", slot, 0, <int>self.mem.nslots - 1)
        if not self._has(number):
            raise ConfigError(f"slot: {number} is free; slots are {self._numbers()}")
        return number

    def _numbers(self):
        return ", ".join(str(number) for number, slot in enumerate(self.slots) if slot) or "none"

    cdef int _free_number(self) except -1:
        cdef int number
        for number in range(SC_MAX_SLOTS):
            if not self._has(number):
                return number
        raise ConfigError(f"slot: all {SC_MAX_SLOTS} numbers are in use")

    cdef list _used(self):
        """(first, end) of the frames of each slot."""
        return [(self.mem.slots[i].frame, self.mem.slots[i].frame + self.mem.slots[i].npages)
                for i in range(self.mem.nslots) if self.mem.slots[i].npages]

    def _tell(self, what, number, slot):
        """Slots are about to change, or have changed."""
        if self.on_slots is not None:
            self.on_slots(what, number, slot)

    def runs(self, gfn, n) -> list:
        """(gfn, frame of RAM, number) of each part of n frames from `gfn` on; ConfigError unless all are in slots."""
        cdef u64 at = check_int("gfn", gfn, 0, (1 << 52) - 1)
        cdef u64 left = check_int("n", n, 1, 1 << 52)
        cdef u64 part, into
        cdef int i
        cdef list found = []
        while left:
            for i in range(self.mem.nslots):
                into = at - self.mem.slots[i].base_gfn
                if into < self.mem.slots[i].npages:
                    break
            else:
                raise ConfigError(f"gfn, n: {n} frames from {gfn:#x} on do not lie in memory slots")
            part = min(left, self.mem.slots[i].npages - into)
            found.append((at, self.mem.slots[i].frame + into, part))
            at += part
            left -= part
        return found

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
        index = self._slot(slot)
        if index not in self._logs:
            self._changed(index, "set" if check_bool("initially_set", initially_set) else "start")  # it may refuse
            self._log(index, initially_set)

    cdef int _log(self, int index, initially_set) except -1:
        """Slot `index` has a dirty log."""
        frames = self.mem.slots[index].npages
        log = allocate(((frames + 63) >> 6) * 8).view(np.uint64)
        if initially_set:
            log[:] = 0xFFFFFFFFFFFFFFFF
            if frames & 63:
                log[len(log) - 1] = (1 << (frames & 63)) - 1
        self._logs[index] = log
        self.mem.slots[index].dirty = <u64 *>_pointer(log)
        self.mem.logging = True
        return 0

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
        index = self._slot(slot)
        if index not in self._logs:
            raise ConfigError(f"slot: {index} is not logged; start_dirty_log({index}) starts a log")
        return index

    def _changed(self, slot, what, first=0, frames=0):
        """The dirty log of `slot` begins ("start", or "set": every frame counts as written), ends ("stop"), or is
        cleared for some frames ("clear")."""
        if self.on_log is not None:
            self.on_log(slot, what, first, frames)

    def __repr__(self):
        return f"Memory({self.bytes.size >> 20} MiB, {len(self.slots) - self.slots.count(None)} slot(s))"


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
