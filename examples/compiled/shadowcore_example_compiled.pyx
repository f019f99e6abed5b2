# cython: language_level=3
"""A policy of replacement, compiled: `lfu` of examples/plugins, without Python at its events."""
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from shadowcore.plugins cimport (
    SC_PLUGIN_NO_PAGE, SC_POLICY_CAPSULE, sc_plugin_host, sc_plugin_page_at, sc_policy_plugin,
)

cdef struct Kept:                   # of a page
    uint64_t born                   # its number among those that were made, from 1 on; 0: it is not in use
    uint64_t uses

cdef struct State:                  # of a VM
    const sc_plugin_host *host
    Kept *pages
    uint64_t made


cdef void *_open(const sc_plugin_host *host) noexcept nogil:
    cdef State *s = <State *>calloc(1, sizeof(State))
    if s == NULL:
        return NULL
    s.host = host
    s.pages = <Kept *>calloc(host.pool_pages, sizeof(Kept))
    if s.pages == NULL:
        free(s)
        return NULL
    return s


cdef void _close(void *state) noexcept nogil:
    free((<State *>state).pages)
    free(state)


cdef void _made(void *state, uint32_t page) noexcept nogil:
    cdef State *s = <State *>state
    s.made += 1
    s.pages[page] = Kept(s.made, 0)


cdef void _used(void *state, uint32_t page) noexcept nogil:
    (<State *>state).pages[page].uses += 1


cdef void _gone(void *state, uint32_t page) noexcept nogil:
    (<State *>state).pages[page].born = 0


cdef uint32_t _victim(void *state) noexcept nogil:
    """The page that was used least often; among equals the one that was made first."""
    cdef State *s = <State *>state
    cdef Kept *least = NULL
    cdef Kept *one
    cdef uint32_t best = SC_PLUGIN_NO_PAGE
    cdef uint32_t page
    for page in range(s.host.pool_pages):
        if s.pages[page].born == 0 or sc_plugin_page_at(s.host, page).root_count:
            continue
        one = &s.pages[page]
        if least == NULL or one.uses < least.uses or (one.uses == least.uses and one.born < least.born):
            least = one
            best = page
    return best


cdef size_t _save(void *state, void *bytes_, size_t room) noexcept nogil:
    cdef State *s = <State *>state
    cdef size_t size = s.host.pool_pages * sizeof(Kept)
    if room >= size + sizeof(s.made):
        memcpy(bytes_, s.pages, size)
        memcpy(<char *>bytes_ + size, &s.made, sizeof(s.made))
    return size + sizeof(s.made)


cdef int _restore(void *state, const void *bytes_, size_t size) noexcept nogil:
    """Refused are bytes that are not of so many pages, or know others than there are."""
    cdef State *s = <State *>state
    cdef size_t pages = s.host.pool_pages * sizeof(Kept)
    cdef uint32_t page
    if size != pages + sizeof(s.made):
        return -1
    memcpy(s.pages, bytes_, pages)
    memcpy(&s.made, <const char *>bytes_ + pages, sizeof(s.made))
    for page in range(s.host.pool_pages):
        if (s.pages[page].born != 0) != (sc_plugin_page_at(s.host, page).active != 0):
            return -1
    return 0


cdef sc_policy_plugin _functions
_functions.struct_size = sizeof(_functions)
_functions.open = _open
_functions.close = _close
_functions.made = _made
_functions.used = _used
_functions.gone = _gone
_functions.victim = _victim
_functions.save = _save
_functions.restore = _restore

policy = PyCapsule_New(&_functions, SC_POLICY_CAPSULE, NULL)
