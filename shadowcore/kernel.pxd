"""A small guest kernel, as Python sees it."""
from shadowcore.kernel_base cimport KernelBase

cdef class Kernel(KernelBase):
    pass
