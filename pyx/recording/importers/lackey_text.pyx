"""The accesses in the text that Valgrind's tool lackey prints with --trace-mem=yes, one a line:

    I  04001100,3       an instruction of 3 bytes is fetched from 0x4001100
     L 1ffeffe7f8,8     8 bytes are read,    S: written,    M: read and written

An address is 1 to 16 hexadecimal digits, a size 1 to 5 decimal ones.
"""
from shadowcore.engine.held cimport held_owners
from shadowcore.engine.types cimport u8, u16, u64

# What stands behind the parsed lines: nothing but a line without its end, no room, a line of another kind, a line that
# begins as an access and is none.
MORE, FULL, OTHER, BAD = range(4)

cdef enum:
    C_MORE = 0
    C_FULL = 1
    C_OTHER = 2
    C_BAD = 3
    LONGEST = 26                    # bytes of a line: three, an address, a comma, a size, its end
    NONE = 255

cdef u8 DIGIT[256]
cdef u8 KIND[256]


cdef void _tables() noexcept nogil:
    cdef int i
    for i in range(256):
        DIGIT[i] = NONE
        KIND[i] = NONE
    for i in range(10):
        DIGIT[c'0' + i] = i
    for i in range(6):
        DIGIT[c'a' + i] = 10 + i
        DIGIT[c'A' + i] = 10 + i
    KIND[c'L'] = 0
    KIND[c'S'] = 1
    KIND[c'M'] = 3

_tables()


cdef int _line(const u8 *at, const u8 *end, u8 *kind, u16 *size, u64 *addr) noexcept nogil:
    """Length of the access in the line at `at`; 0: the line has no end yet; -1: another kind; -2: no access.

    Nothing is read from `end` on.
    """
    cdef const u8 *p = at + 3
    cdef const u8 *first = p
    cdef u64 number = 0
    cdef u64 length = 0
    cdef u8 digit
    if end - at < 3:
        while at < end:
            if at[0] == c'\n':
                return -1
            at += 1
        return 0
    if at[0] == c'I' and at[1] == c' ' and at[2] == c' ':
        kind[0] = 2
    elif at[0] == c' ' and at[2] == c' ' and KIND[at[1]] != NONE:
        kind[0] = KIND[at[1]]
    else:
        return -1
    while p < end:
        digit = DIGIT[p[0]]
        if digit == NONE:
            break
        number = number << 4 | digit
        p += 1
    if p - first > 16:
        return -2
    if p == end:
        return 0
    if p == first or p[0] != c',':
        return -2
    p += 1
    first = p
    while p < end:
        digit = DIGIT[p[0]]
        if digit > 9:
            break
        length = length * 10 + digit
        p += 1
        if p - first > 5:
            return -2
    if p == end:
        return 0
    if p == first or p[0] != c'\n' or length == 0 or length > 0xFFFF:
        return -2
    addr[0] = number
    size[0] = <u16>length
    return <int>(p + 1 - at)


def parse(const u8[::1] text, Py_ssize_t start, Py_ssize_t stop, u8[::1] kind, u16[::1] size, u64[::1] addr,
          Py_ssize_t filled):
    """Parse whole lines of text[start:stop], as long as they are accesses, into the arrays from `filled` on.

    Returns (position of the first byte that is not parsed, elements filled, what stands there: MORE, FULL, OTHER, BAD).
    kind: 0 read, 1 write, 2 fetch, 3 read and write. The GIL is released.
    """
    cdef Py_ssize_t room = kind.shape[0]
    cdef const u8 *at
    cdef const u8 *end
    cdef int length = 0
    cdef int what = C_MORE
    cdef list _owners = (held_owners(text.base) + held_owners(kind.base)
                         + held_owners(size.base) + held_owners(addr.base))
    if not 0 <= start <= stop <= text.shape[0]:
        raise ValueError(f"bytes {start} to {stop} of {text.shape[0]}")
    if size.shape[0] != room or addr.shape[0] != room or not 0 <= filled <= room:
        raise ValueError("kind, size and addr: arrays of one length, no less than `filled`, are needed")
    if start == stop:
        return start, filled, MORE
    at = &text[start]
    end = at + (stop - start)
    with nogil:
        while at < end:
            if filled == room:
                what = C_FULL
                break
            length = _line(at, end, &kind[filled], &size[filled], &addr[filled])
            if length <= 0:
                what = C_MORE if length == 0 else C_OTHER if length == -1 else C_BAD
                if length == 0 and end - at >= LONGEST:
                    what = C_BAD
                break
            at += length
            filled += 1
    return stop - (end - at), filled, what
