"""What a batch of operations came to."""
from shadowcore.events cimport sc_stats
from shadowcore.types cimport u8, u16, u64

cdef struct sc_row:                 # an operation of which there is more to say than where it led
    u64 number                      # its place in the batch
    u16 error_code
    u16 exits
    u8 outcome
    u8 emulated

cdef class Block:
    cdef void *at                   # malloc'ed
    cdef size_t size                # bytes

cdef Block block_new(size_t size)

cdef class RunResult:
    cdef u64 n                      # operations
    cdef u64 n_rows
    cdef Block rows                 # of sc_row
    cdef Block gpas                 # u64, per operation
    cdef Block values               # u64; None if no bytes moved
    cdef Block highs                # u64; None if no operation has 16 bytes
    cdef sc_stats before            # counters of the VM before the batch
    cdef sc_stats after
    cdef dict columns               # arrays that were asked for

    cdef object _sparse(self, name, dtype)
    cdef object _dense(self, name, Block block)
