"""Arrays of the caller that are read, or written, without the GIL: nobody can move their bytes meanwhile."""
from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.weakref cimport PyWeakref_NewRef
from cython cimport freelist

import numpy as np

cdef object _ARRAY = np.ndarray


cdef list held_owners(object array):
    """Weak references to `array` and to all arrays that it is a view of, be it by way of a memoryview or of what numpy
    puts in between. numpy resizes no array that has one, not even where it is told not to look (refcheck=False)."""
    cdef list found = []
    while array is not None:
        if isinstance(array, _ARRAY):
            found.append(PyWeakref_NewRef(array, None))
            array = array.base
        elif isinstance(array, memoryview):
            array = array.obj
        else:
            array = getattr(array, "base", None)
    return found


@freelist(4)
cdef class Held:
    """The buffer of an object while something reads it, or writes to it. Most owners move no bytes of which somebody
    holds the buffer; numpy is kept from it by weak references."""

    def __cinit__(self, array, writable=False):
        self.owners = held_owners(array)
        PyObject_GetBuffer(array, &self.view, PyBUF_STRIDES | (PyBUF_WRITABLE if writable else 0))
        self.has_view = True

    def __dealloc__(self):
        if self.has_view:
            PyBuffer_Release(&self.view)
