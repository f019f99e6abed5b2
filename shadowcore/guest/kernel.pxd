"""A small guest kernel, as Python sees it."""
from shadowcore.guest.kernel_base cimport KernelBase

cdef class Kernel(KernelBase):
    pass
