"""The fault path: link the levels of a shadow walk and install its leaf."""
from shadowcore.state cimport sc_mmu, sc_vcpu
from shadowcore.types cimport u32
from shadowcore.walker cimport sc_walk

cdef struct sc_leaf:                # outcome of one fault, as far as the shadow is concerned
    u32 spte                        # number of the leaf
    u32 large                       # of the entry that stands for the guest's large page, or SC_NONE
    bint filled                     # the leaf (or a link to it) was missing
    bint changed                    # a present leaf got other rights
    bint emulate                    # the access must be done by the emulator
    bint plain                      # filled as it is, with nothing for this access to add
    bint refused                    # quirk ROLE_WITHOUT_ACCESS: the leaf as it stands forbids the access

cdef int fetch(sc_mmu *mmu, sc_vcpu *v, u32 access, bint refused, const sc_walk *hw, sc_walk *w,
               sc_leaf *leaf) noexcept nogil
