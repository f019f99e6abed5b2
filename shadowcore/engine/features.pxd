"""What a processor can, a bit each: sc_vcpu.features. In the order of shadowcore.config.FEATURES."""

cdef enum:
    FEAT_NX = 1 << 0
    FEAT_GBPAGES = 1 << 1
    FEAT_LA57 = 1 << 2
    FEAT_PSE36 = 1 << 3
    FEAT_SMEP = 1 << 4
    FEAT_SMAP = 1 << 5
    FEAT_PKU = 1 << 6
    FEAT_PCID = 1 << 7
    FEAT_UMIP = 1 << 8
    FEAT_FSGSBASE = 1 << 9
    FEAT_XSAVE = 1 << 10
    FEAT_INVPCID = 1 << 11
    FEAT_COUNT = 12
