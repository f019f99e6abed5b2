"""What, besides the gfn, identifies a shadow page: 32 bits."""
from shadowcore.engine.types cimport ACC_ALL, MODE_64, u32

cdef enum:
    ROLE_GLEVELS = 0                # bits 0-3: guest paging levels, MODE_*
    ROLE_LEVEL = 4                  # bits 4-7: level of the page, 1 to 5
    ROLE_QUADRANT = 8               # bits 8-9: which part of a table of 4-byte entries
    ROLE_DIRECT = 10                # bit 10: no guest table behind the page (2007: metaphysical)
    ROLE_ACCESS = 11                # bits 11-13: ACC_* that the levels above allow (direct: that every leaf grants)
    ROLE_NXE = 14                   # bit 14: EFER.NXE, with which bit 63 means no-execute
    ROLE_PSE = 15                   # bit 15: CR4.PSE, with which 32-bit directories hold 4 MiB leaves
    ROLE_WP0 = 16                   # bit 16: supervisor stores ignore W by leaves that are W and not U
    ROLE_GLOBAL = 17                # bit 17: direct: G of every leaf
    ROLE_PKEY = 18                  # bits 18-21: direct: protection key of every leaf
    ROLE_DIRTY = 22                 # bit 22: direct, wp0, leaves not writable for the guest: its entry is dirty
    ROLE_SMEP = 23                  # bit 23: CR4.SMEP while supervisor stores ignore W (unsync)
    ROLE_SMAP = 24                  # bit 24: CR4.SMAP, or CR4.PKE, while they do (unsync)
    ROLE_INVALID = 25               # bit 25: zapped: no key has it (unsync)
    ROLE_NESTED = 26                # bit 26: direct: stands for a guest table that the processor walks itself (agile)
    ROLE_HOST = 27                  # bit 27: direct: a table of the host's (agile)
    ROLE_BITS = 28                  # bits in use

cdef inline u32 role_field(u32 role, int at, u32 mask) noexcept nogil:
    return (role >> at) & mask

cdef inline int role_level(u32 role) noexcept nogil:
    return <int>role_field(role, ROLE_LEVEL, 15)

cdef inline u32 role_access(u32 role) noexcept nogil:
    """ACC_* of ROLE_ACCESS."""
    return role_field(role, ROLE_ACCESS, ACC_ALL)

cdef inline bint role_direct(u32 role) noexcept nogil:
    return role_field(role, ROLE_DIRECT, 1)

cdef inline bint role_invalid(u32 role) noexcept nogil:
    return role_field(role, ROLE_INVALID, 1)

cdef inline bint role_nested(u32 role) noexcept nogil:
    """The page stands for a guest table that the processor walks, and is empty: links to it are marks (agile)."""
    return role_field(role, ROLE_NESTED, 1)

cdef inline u32 role_of_nested(u32 role) noexcept nogil:
    """Role of the page that stands for a guest table in the place of a shadow page of `role`."""
    return role | 1 << ROLE_DIRECT | 1 << ROLE_NESTED

cdef inline u32 role_of_host(int level) noexcept nogil:
    """Role of a table of the host's, beside shadow pages: the same whatever the guest's registers are."""
    return (MODE_64 << ROLE_GLEVELS | <u32>level << ROLE_LEVEL | 1 << ROLE_DIRECT | ACC_ALL << ROLE_ACCESS
            | 1 << ROLE_HOST)

cdef inline int role_pte_size(u32 role) noexcept nogil:
    """Bytes of an entry of the guest table behind a page that is not direct."""
    return 4 if role_field(role, ROLE_GLEVELS, 15) == 2 else 8
