"""What has to hold for the engine to compile: a code fits into the bits that carry it.

`sc_check(condition)`, at the top of a module beside what it is about. The condition is made of constants; the C
compiler stops where it is false (C11, C++17, MSVC), and no code comes of it.
"""

cdef extern from *:
    """
    #ifndef sc_check
    #ifdef __cplusplus
    #define sc_check(condition) static_assert(condition, #condition)
    #else
    #define sc_check(condition) ((void)sizeof(struct { int does_not_fit : (condition) ? 1 : -1; }))
    #endif
    #endif
    """
    void sc_check(bint condition) noexcept nogil
