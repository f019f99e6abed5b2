"""Operations of the guest kernel: what its processes ask for, what it does by itself. The unit of batches."""
from shadowcore.engine.types cimport u8, u32, u64
from shadowcore.guest.state cimport sc_guest

# Values of shadowcore.guest.options.Call.
cdef enum:
    CALL_TOUCH = 0
    CALL_SWITCH = 1
    CALL_SYSCALL = 2
    CALL_SPAWN = 3
    CALL_FORK = 4
    CALL_EXEC = 5
    CALL_EXIT = 6
    CALL_MMAP = 7
    CALL_MUNMAP = 8
    CALL_MPROTECT = 9
    CALL_BRK = 10
    CALL_AGE = 11
    CALL_SWAP_OUT = 12
    CALL_PIPE_WRITE = 13
    CALL_PIPE_READ = 14
    CALL_IDLE = 15
    CALL_DROP = 16
    CALL_MOVE = 17
    CALL_CPU = 18
    CALL_COUNT = 19

    CALL_BARE = 1                   # flags of SPAWN and EXEC: nothing is mapped, the heap begins at addr

cdef struct sc_call:                # the layout of CALL_DTYPE
    u8 op                           # CALL_*
    u8 flags                        # TOUCH_*, MAP_SHARED, MAP_GROWS or CALL_BARE
    u8 size                         # bytes of each access of a TOUCH
    u8 prot                         # PROT_* of MMAP, MPROTECT
    u32 process                     # its number
    u64 addr
    u64 count                       # accesses, bytes or pages
    u64 value                       # stride, region, child, program, file, pipe, a move's source, processor, calls amid

# Why a call cannot be.
cdef enum:
    BAD_NOTHING = 0
    BAD_OP = 1
    BAD_PROCESS = 2
    BAD_SIZE = 3
    BAD_RANGE = 4
    BAD_PROT = 5
    BAD_FILE = 6
    BAD_PROGRAM = 7
    BAD_PIPE = 8
    BAD_FLAGS = 9
    BAD_CPU = 10
    BAD_AMID = 11

cdef int call_check(const sc_guest *g, const sc_call *c, u64 after) noexcept nogil
cdef int call_run(sc_guest *g, const sc_call *calls, u64 n, u64 *at, u64 *within, u64 budget,
                  u64 *results) noexcept nogil
