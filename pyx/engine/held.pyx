"""Arrays of the caller that are read, or written, without the GIL: nobody can move their bytes meanwhile."""
import numpy as np

from cpython.buffer cimport PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.weakref cimport PyWeakref_NewRef
from cython cimport freelist

cdef enum:
    DEEPEST = 32                    # views of views: no real array has so many, and objects that lie may have no end

cdef object _ARRAY = np.ndarray
cdef object _base = np.ndarray.base.__get__     # also of subclasses that have another `base`


cdef list held_owners(object array):
    """Weak references to `array` and to all arrays that it is a view of, be it by way of a memoryview or of what numpy
    puts in between. numpy resizes no array that has one, not even where it is told not to look (refcheck=False)."""
    cdef list found = []
    for _ in range(DEEPEST):
        if isinstance(array, _ARRAY):
            found.append(PyWeakref_NewRef(array, None))
            array = _base(array)
        elif isinstance(array, memoryview):
            array = array.obj
        else:
            array = getattr(array, "base", None)
        if array is None:
            break
    return found


@freelist(4)
cdef class Held:
    """The buffer of `array`, as long as something reads it. Most owners move no bytes of which somebody holds the
    buffer; numpy is kept from it by weak references."""

    def __cinit__(self, array):
        self.owners = held_owners(array)
        PyObject_GetBuffer(array, &self.view, PyBUF_STRIDES)
        self.has_view = True

    def __dealloc__(self):
        if self.has_view:
            PyBuffer_Release(&self.view)
