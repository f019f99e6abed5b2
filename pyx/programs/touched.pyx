"""Which pages accesses touch, and how: a set of pages that says what is new in it."""
import numpy as np

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from shadowcore.engine.held cimport held_owners
from shadowcore.engine.types cimport u8, u16, u64

from shadowcore.errors import EngineError

READ = 1                            # bits of what was done to a page
WRITE = 2
FETCH = 4

cdef enum:
    C_READ = 1
    C_WRITE = 2
    C_FETCH = 4
    MODIFY = 3                      # the last code of an access, see recordings
    FIRST = 1 << 10                 # slots

# By the code of an access. `add` refuses codes that there are not; who changes the array meanwhile gets nothing noted.
cdef u8[256] _BITS
memset(_BITS, 0, sizeof(_BITS))
_BITS[0], _BITS[1], _BITS[2], _BITS[MODIFY] = C_READ, C_WRITE, C_FETCH, C_READ | C_WRITE


cdef class PageSet:
    """Numbers of pages of 4096 bytes, each with READ, WRITE and FETCH of what was done to it."""
    cdef u64 *_keys                 # number + 1; 0: free
    cdef u8 *_flags                 # 0: removed
    cdef u64 _slots                 # a power of two
    cdef u64 _used                  # slots that are not free
    cdef u64 _count                 # pages in the set
    cdef bint _busy                 # in use, without the GIL

    def __cinit__(self):
        self._keys = <u64 *>calloc(FIRST, sizeof(u64))
        self._flags = <u8 *>calloc(FIRST, 1)
        if self._keys == NULL or self._flags == NULL:
            raise MemoryError
        self._slots = FIRST

    def __dealloc__(self):
        free(self._keys)
        free(self._flags)

    cdef inline u64 _find(self, u64 page) noexcept nogil:
        """The slot that has the page, or the free one where it belongs."""
        cdef u64 at = (page * <u64>0x9E3779B97F4A7C15ULL) >> 20 & (self._slots - 1)
        while self._keys[at] != 0 and self._keys[at] != page + 1:
            at = (at + 1) & (self._slots - 1)
        return at

    cdef int _grow(self) except -1 nogil:
        """Twice the slots if most are used by pages; removed ones are forgotten."""
        cdef u64 *keys = self._keys
        cdef u8 *flags = self._flags
        cdef u64 slots = self._slots
        cdef u64 wanted = slots * 2 if self._count * 4 > slots else slots
        cdef u64 i, at
        cdef u64 *new_keys = <u64 *>calloc(wanted, sizeof(u64))
        cdef u8 *new_flags = <u8 *>calloc(wanted, 1)
        if new_keys == NULL or new_flags == NULL:
            free(new_keys)
            free(new_flags)
            with gil:
                raise MemoryError
        self._keys = new_keys
        self._flags = new_flags
        self._slots = wanted
        self._used = self._count
        for i in range(slots):
            if keys[i] != 0 and flags[i] != 0:
                at = self._find(keys[i] - 1)
                new_keys[at] = keys[i]
                new_flags[at] = flags[i]
        free(keys)
        free(flags)
        return 0

    def add(self, const u8[::1] op, const u16[::1] size, const u64[::1] addr):
        """Accesses of a program (op as recordings have it). Two arrays: pages that are new, or of which something new
        was done, in order of that (a page comes once for each news); and what was done to them, all of it."""
        cdef Py_ssize_t n = op.shape[0]
        cdef Py_ssize_t i
        cdef u8 odd = 0
        cdef list pages = []
        cdef list flags = []
        cdef list _owners = held_owners(op.base) + held_owners(size.base) + held_owners(addr.base)
        if size.shape[0] != n or addr.shape[0] != n:
            raise ValueError("op, size and addr: arrays of one length are needed")
        for i in range(n):
            odd |= op[i] > MODIFY
        if odd:
            raise ValueError(f"op: a code that is none of 0 to {MODIFY}")
        self._enter()
        try:
            self._add(op, size, addr, pages, flags)
        finally:
            self._busy = False
        return np.array(pages, dtype=np.uint64), np.array(flags, dtype=np.uint8)

    cdef int _enter(self) except -1:
        if self._busy:
            raise EngineError("this set of pages is in use by another thread")
        self._busy = True
        return 0

    cdef int _add(self, const u8[::1] op, const u16[::1] size, const u64[::1] addr, list pages,
                  list flags) except -1:
        cdef Py_ssize_t n = op.shape[0]
        cdef Py_ssize_t i
        cdef u64 page, last
        cdef u64 known = ~<u64>0    # page whose slot is `slot`
        cdef u64 slot = 0
        cdef u8 bits
        with nogil:
            for i in range(n):
                page = addr[i] >> 12
                last = (addr[i] + (size[i] - 1 if size[i] else 0)) >> 12
                bits = _BITS[op[i]]
                while True:
                    if page != known:
                        slot = self._find(page)
                        known = page
                    if self._flags[slot] & bits != bits:
                        if self._keys[slot] == 0:
                            if self._used * 2 >= self._slots:
                                self._grow()
                                slot = self._find(page)
                            self._keys[slot] = page + 1
                            self._used += 1
                        if self._flags[slot] == 0:
                            self._count += 1
                        self._flags[slot] |= bits
                        with gil:
                            pages.append(page)
                            flags.append(self._flags[slot])
                    if page == last:
                        break
                    page = (page + 1) & <u64>0xFFFFFFFFFFFFF
        return 0

    def remove(self, u64 first, u64 stop):
        """Forget pages [first, stop)."""
        cdef u64 at, page
        self._enter()
        with nogil:
            if stop > first and stop - first < self._slots:
                for page in range(first, stop):
                    at = self._find(page)
                    self._count -= self._flags[at] != 0
                    self._flags[at] = 0
            else:
                for at in range(self._slots):
                    if self._flags[at] != 0 and first <= self._keys[at] - 1 < stop:
                        self._flags[at] = 0
                        self._count -= 1
        self._busy = False

    def clear(self):
        """Forget all."""
        self.remove(0, ~<u64>0)

    def __len__(self):
        return self._count
