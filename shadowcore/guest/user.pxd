"""What the guest's processes do: accesses, with their page faults serviced, and data that goes through pipes."""
from shadowcore.engine.access cimport sc_result
from shadowcore.engine.types cimport u8, u16, u32, u64
from shadowcore.guest.state cimport sc_guest

# Which addresses a series of accesses goes to, and what it does there.
cdef enum:
    TOUCH_WRITE = 1
    TOUCH_FETCH = 2
    TOUCH_RANDOM = 4                # at random within [addr, addr + value), else every `value` bytes from addr

# What an access of a program recording is: values of shadowcore.recording.format.
cdef enum:
    PROGRAM_READ = 0
    PROGRAM_WRITE = 1
    PROGRAM_FETCH = 2
    PROGRAM_MODIFY = 3

cdef int user_access(sc_guest *g, u32 op, bint user, u32 size, u64 va, u64 value, sc_result *r) noexcept nogil
cdef int user_touch(sc_guest *g, u32 flags, u32 size, u64 addr, u64 value, u64 start, u64 stop,
                    u64 *refused) noexcept nogil
cdef int user_array(sc_guest *g, const u64 *addr, const u8 *write, bint all_write, const u64 *value, u32 size,
                    u64 *done, u64 stop, u8 *outcome, u64 *loaded, u64 *gpa, u64 *refused) noexcept nogil
cdef int user_program(sc_guest *g, const u8 *op, const u16 *size, const u64 *addr, u64 *done, u64 stop,
                      u64 *refused) noexcept nogil
cdef int pipe_write(sc_guest *g, u32 number, u64 va, u32 nbytes) noexcept nogil
cdef int pipe_read(sc_guest *g, u32 number, u64 va) noexcept nogil
cdef int user_reclaim(sc_guest *g) noexcept nogil
