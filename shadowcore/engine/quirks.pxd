"""Defects of the series of January 2007 and of Linux 6.1, one by one: members of shadowcore.config.Quirk, bit by bit in
sc_mmu.quirks."""

cdef enum:
    QUIRK_TWO_EXITS = 1 << 0
    QUIRK_ACCESSED_EARLY = 1 << 1
    QUIRK_DIRTY_LOST = 1 << 2
    QUIRK_ROLE_WITHOUT_ACCESS = 1 << 3
    QUIRK_ROLE_WITHOUT_MODE = 1 << 4
    QUIRK_PDE_WRITE = 1 << 5
    QUIRK_NO_REFILL_AT_CR3 = 1 << 6
    QUIRK_RMAP_LEAK = 1 << 7
    QUIRK_PAGING_OFF_UNPROTECTED = 1 << 8
    QUIRK_ABSENT_PDPTES = 1 << 9
    QUIRK_ROOT_EMPTIED = 1 << 10
    QUIRK_NX_LEAF_ONLY = 1 << 11
    QUIRK_PROCESSOR_CODE = 1 << 12
    QUIRK_EXIT_FLUSHES = 1 << 13
    QUIRK_GLOBAL_WITHOUT_PGE = 1 << 14
    QUIRK_IGNORED_BITS_REFUSED = 1 << 15
    QUIRK_ROLE_WITHOUT_NXE = 1 << 16
    QUIRK_WP0_HIDES_USER = 1 << 17
    QUIRK_FAULT_KEEPS_LEAF = 1 << 18
    QUIRK_TAGGED_CR3_LAGS = 1 << 19
    QUIRK_DEVICE_UNASKED = 1 << 20
    QUIRK_STORE_ROUNDED = 1 << 21
    QUIRK_COUNT = 22
