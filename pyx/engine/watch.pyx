"""Looks for signals while a call works without the GIL, and keeps what their handlers raise until the call can end."""
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF

from shadowcore.engine.watch cimport WATCH_PERIOD, sc_watch, watch_clock

from shadowcore.errors import Interrupted


cdef bint _look(sc_watch *w) noexcept with gil:
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        if w.raised == NULL:        # else one has raised already, and the call is about to end
            Py_INCREF(error)
            w.raised = <void *>error
    return w.raised != NULL


cdef bint watch_look(sc_watch *w) noexcept nogil:
    """Run the handlers of signals that have arrived; True if one raised. In a thread that is not Python's main one
    there are none."""
    cdef bint stop = _look(w)
    w.due = watch_clock() + WATCH_PERIOD
    return stop


cdef object watch_raised(sc_watch *w):
    """What a handler raised since the last call, or None."""
    cdef object error
    if w.raised == NULL:
        return None
    error = <object>w.raised
    w.raised = NULL
    Py_DECREF(error)
    return error


cdef object watch_error(object error, object result):
    """The exception that a batch ends with: `error`, with what was done as its `result`. Ctrl-C becomes Interrupted."""
    if type(error) is KeyboardInterrupt:
        return Interrupted(result)
    try:
        error.result = result
    except Exception:               # an exception that takes no attributes
        pass
    return error
