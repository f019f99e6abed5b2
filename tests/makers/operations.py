"""Arrays of operations, from rows as a test writes them."""

import numpy as np

import shadowcore as sc

FIELDS = ("op", "addr", "value", "size", "user")

# With the fields that operations on 16 bytes and CMPXCHG have besides.
WIDE = np.dtype([*sc.OP_DTYPE.descr, ("value_high", "<u8"), ("expected", "<u8"), ("expected_high", "<u8")])


def operations(*rows, dtype=sc.OP_DTYPE, size=8):
    """Rows are tuples (op, addr[, value[, size[, user]]]), all of one length, in which `size` stands for one that is
    not said; or dicts of fields, of which those that are not said are 0."""
    ops = np.zeros(len(rows), dtype)
    if rows and isinstance(rows[0], dict):
        for i, row in enumerate(rows):
            for name, value in row.items():
                ops[name][i] = value
        return ops
    ops["size"] = size
    for name, column in zip(FIELDS, zip(*rows, strict=True), strict=False):
        ops[name] = np.array(column, np.uint64)
    return ops
