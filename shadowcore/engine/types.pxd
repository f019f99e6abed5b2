"""Integer types, codes and bit names shared by every module.

Words: gva, gpa, gfn (guest virtual/physical address, guest frame number), hpa, hfn (host physical address, host
frame number), gpte, spte (guest/shadow page table entry), sp (shadow page), role, root, rmap, zap, exit.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

ctypedef uint8_t u8
ctypedef uint16_t u16
ctypedef uint32_t u32
ctypedef uint64_t u64
ctypedef int32_t i32
ctypedef int64_t i64

cdef enum:
    SC_NONE = 0xFFFFFFFF            # "no shadow page" where a page index is expected

# What became of an access; those from 0 to 3, and 6, are values of RunResult.outcome.
cdef enum:
    RC_OK = 0
    RC_PF = 1                       # guest #PF
    RC_GP = 2                       # guest #GP
    RC_MMIO = 3                     # the address is in no memory slot
    RC_EMULATE = 4                  # the store (or load) must be done by the emulator
    RC_RETRY = 5                    # the shadow was mended: the processor walks again
    RC_UD = 6                       # guest #UD
    RC_HOST = 7                     # nested paging: the host's tables refuse the walk, which is an exit
    RC_EXHAUSTED = -1               # every page of the pool is pinned as a root
    RC_LIVELOCK = -2                # an access that never ends: a defect of ours, reported and not looped on
    RC_BAD_OP = -3                  # operation code that does not exist
    RC_UNHANDLED = -4               # a store that cannot be emulated, to a table that cannot be unprotected
    RC_HOOK = -5                    # the embedder's callback raised
    RC_AUDIT = -6                   # the operation was done, and an audit at a named point found something
    RC_UNGRANTED = -7               # a store that cannot be emulated, and that no leaf can grant (roots.wp0_leaves)

# Page-fault error code (SDM vol. 3, 4.7).
cdef enum:
    PF_P = 1                        # 0: an entry was not present; 1: rights or reserved bit
    PF_W = 2                        # the access was a write
    PF_U = 4                        # the access was made in user mode
    PF_RSVD = 8                     # a reserved bit was set in a present entry
    PF_I = 16                       # the access was an instruction fetch
    PF_PK = 32                      # protection key violation
    PF_SS = 64                      # the access was one to a shadow stack
    PF_SGX = 1 << 15                # refused by SGX, after the walk

# In the error code of an exit of nested paging (APM vol. 2, 15.25.6), above the bits of PF_*: the host's tables refused
# the final address of the walk, or an entry of a guest's table.
cdef inline u64 npf_final() noexcept nogil:
    return <u64>1 << 32

cdef inline u64 npf_table() noexcept nogil:
    return <u64>1 << 33

# What an access asks for, in the bits by which an error code tells it. The other bits of an error code are answers.
cdef enum:
    PF_ASKED = PF_W | PF_U | PF_I   # of an access that there is; shadow stacks are not built
    PF_ACCESSES = 2 * PF_SS         # what an access may ask for is a number below this

# Rights, as in a role: what the entries above allow.
cdef enum:
    ACC_X = 1                       # may be executed
    ACC_W = 2                       # may be written
    ACC_U = 4                       # may be used in user mode
    ACC_ALL = 7

# Guest paging modes; the number is that of the levels a guest walk goes through (PAE: cached root entries + 2).
cdef enum:
    MODE_OFF = 0
    MODE_32 = 2
    MODE_PAE = 3
    MODE_64 = 4
    MODE_LA57 = 5
