"""Signals that arrive while a call works without the GIL. They are looked at by the clock, not by what was done, for
one operation may take a thousand times as long as another."""
from shadowcore.engine.types cimport u64

cdef enum:
    WATCH_PERIOD = 50_000_000       # nanoseconds from one look to the next

cdef struct sc_watch:
    u64 due                         # of watch_clock, when to look next; 0: at once
    void *raised                    # PyObject *, a reference of ours: what a handler raised, or NULL

cdef extern from *:
    """
    #if defined(_WIN32)
    #include <windows.h>
    static inline unsigned long long sc_watch_clock(void)
    {
        return GetTickCount64() * 1000000ULL;
    }
    #else
    #include <time.h>
    static inline unsigned long long sc_watch_clock(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (unsigned long long)now.tv_sec * 1000000000ULL + (unsigned long long)now.tv_nsec;
    }
    #endif
    """
    u64 watch_clock "sc_watch_clock"() noexcept nogil

cdef inline bint watch_due(const sc_watch *w) noexcept nogil:
    """It is time to look. NULL: nobody wants to know."""
    return w != NULL and watch_clock() >= w.due

cdef bint watch_look(sc_watch *w) noexcept nogil
cdef object watch_raised(sc_watch *w)
cdef object watch_error(object error, object result)
