"""Names of bits and of results, for the model of the shadow MMU and all that drives it."""

# Bits of an spte as the vectors have them: present, writable, user, no execution, accessed, dirty, large, writable on
# the host, writable as far as the MMU is concerned, made by the MMU, global, device entry.
P, W, U, NX, A, D, PS, HW, MW, MP, G, DEV = (1 << i for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15))
# Bits of the error code of a page fault: present, write, user, reserved bit, fetch.
PF_P, PF_W, PF_U, PF_R, PF_I = 1, 2, 4, 8, 16
# Rights: execute, write, user.
X_, W_, U_, ACC_ALL = 1, 2, 4, 7
# Register bits.
CR0_PG, CR0_WP = 1 << 31, 1 << 16
PSE, PAE, PGE, PCIDE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 17, 1 << 20, 1 << 21
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
# Places in a page role.
QUAD, DIRECT, ACC, INVALID, RNX, RWP, RSMEP, RSMAP = 5, 7, 8, 11, 12, 13, 14, 15
# What becomes of a fault. Both last ones are emulated; a device access is never run again natively.
FIXED, SPURIOUS, RETRY, EMULATE, DEVICE_ACCESS = "fixed", "spurious", "retry", "emulate", "device"
ENOENT, EEXIST, EINVAL = 2, 17, 22


class GP(Exception):
    """A general protection fault of the guest."""


class Fault(Exception):
    """A page fault that the guest gets."""

    def __init__(self, code):
        self.code = code


def bits(first, last):
    return ((1 << (last - first + 1)) - 1) << first
