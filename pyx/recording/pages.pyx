"""Columns of addresses, split into pages and offsets, and joined again: few pages are used again and again, so that
their numbers in a list, of one or two bytes, and the offsets are a third of the addresses."""
from libc.stdlib cimport calloc, free

from shadowcore.engine.held cimport held_owners
from shadowcore.engine.types cimport u8, u16, u32, u64

PAGES_MAX = 1 << 16                 # pages that a list can have

cdef enum:
    C_PAGES_MAX = 1 << 16
    BUCKETS = 1 << 18               # four for each page

ctypedef fused index_t:
    u8
    u16
    u32


cdef inline u64 _bucket(u64 page) noexcept nogil:
    return (page * <u64>0x9E3779B97F4A7C15) >> (64 - 18)


def split_pages(const u64[::1] addr, u64[::1] pages, u16[::1] index, u16[::1] offset):
    """addr[i] becomes pages[index[i]] * 4096 + offset[i]. Returns the number of pages, in the order of first use.

    -1 if there are more pages than room for them in `pages`; index and offset are then half done. The GIL is released.
    """
    cdef Py_ssize_t n = addr.shape[0]
    cdef Py_ssize_t room = min(pages.shape[0], C_PAGES_MAX)
    cdef Py_ssize_t i
    cdef Py_ssize_t used = 0
    cdef u64 page, at
    cdef u64 last = 1               # pages << 12 | 1 is the address of no page
    cdef u32 number = 0
    cdef u32 *table                 # of numbers of pages, plus 1
    cdef list _owners = (held_owners(addr.base) + held_owners(pages.base)
                         + held_owners(index.base) + held_owners(offset.base))
    if index.shape[0] != n or offset.shape[0] != n:
        raise ValueError("addr, index and offset: arrays of one length are needed")
    table = <u32 *>calloc(BUCKETS, sizeof(u32))
    if table == NULL:
        raise MemoryError
    with nogil:
        for i in range(n):
            page = addr[i] & ~<u64>4095
            if page != last:
                at = _bucket(page >> 12)
                while table[at] != 0 and pages[table[at] - 1] != page >> 12:
                    at = (at + 1) & (BUCKETS - 1)
                if table[at] == 0:
                    if used == room:
                        used = -1
                        break
                    pages[used] = page >> 12
                    used += 1
                    table[at] = <u32>used
                number = table[at] - 1
                last = page
            index[i] = <u16>number
            offset[i] = <u16>(addr[i] & 4095)
        free(table)
    return used


def join_pages(const u64[::1] pages, const index_t[::1] index, const u16[::1] offset, u64[:] addr):
    """The inverse: addr[i] = pages[index[i]] * 4096 + offset[i], modulo 2**64. The GIL is released.

    Returns the first i with an index that no page has (what follows is not done), len(addr) if there is none.
    """
    cdef Py_ssize_t n = addr.shape[0]
    cdef u64 count = <u64>pages.shape[0]
    cdef u64 at
    cdef Py_ssize_t i
    cdef Py_ssize_t done = n
    cdef list _owners = (held_owners(pages.base) + held_owners(index.base)
                         + held_owners(offset.base) + held_owners(addr.base))
    if index.shape[0] != n or offset.shape[0] != n:
        raise ValueError("index, offset and addr: arrays of one length are needed")
    with nogil:
        for i in range(n):
            at = index[i]           # read once: the arrays may be somebody else's as well
            if at >= count:
                done = i
                break
            addr[i] = (pages[at] << 12) + offset[i]
    return done
