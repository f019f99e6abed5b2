"""Batches of operations."""
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport i64, u8, u16, u32, u64

# Loads, stores and fetches of at most 8 bytes, a column for each field: element 0 and the bytes from one to the next.
cdef struct sc_columns:
    const u8 *gva
    i64 gva_step
    const u8 *value                 # or NULL: 0
    i64 value_step
    const u8 *op                    # or NULL: as all_op says, and so on
    i64 op_step
    const u8 *user
    i64 user_step
    const u8 *size
    i64 size_step
    u8 all_op
    u8 all_user
    u8 all_size

cdef struct sc_columns_out:         # arrays of results, or NULL
    u64 *gpa
    u64 *value
    u16 *error_code
    u16 *exits
    u8 *outcome
    u8 *emulated

cdef u64 columns_check(const sc_columns *c, u64 n) noexcept nogil
cdef int columns_run(sc_mmu *mmu, u32 number, const sc_columns *c, u64 n, bint data, const sc_columns_out *out,
                     bint *no_memo, u64 *done) noexcept nogil
cdef object run_columns(Mmu shell, u32 number, const sc_columns *c, u64 n, bint data)
cdef object run_batch(Mmu shell, u32 number, object ops, bint data)
