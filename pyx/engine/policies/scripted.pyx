"""Policies and decisions in Python (shadowcore.plugins), behind the functions that compiled ones have.

What they raise is kept until the call that is under way is whole. Until then a policy is not told and asked any more.
"""
import operator

from libc.string cimport memset

from shadowcore.engine.hooks cimport HOOK_RAISED
from shadowcore.engine.types cimport u32
from shadowcore.plugins cimport (
    SC_DECIDE_EMULATE, SC_DECIDE_UNPROTECT, SC_DECIDE_UNSYNC, SC_DECIDE_ZAP, SC_PLUGIN_NO_PAGE, sc_decisions_plugin,
    sc_policy_plugin, sc_table_store,
)

from shadowcore.errors import PluginError
from shadowcore.plugins import ANSWERS, TableStore

assert [ANSWERS[i] for i in (SC_DECIDE_EMULATE, SC_DECIDE_UNPROTECT, SC_DECIDE_UNSYNC, SC_DECIDE_ZAP)] == [
    "emulate", "unprotect", "unsync", "zap"]

cdef enum:
    MADE = 0
    USED = 1
    GONE = 2


cdef class Scripted:
    """A plug-in in Python of one VM, and what it did wrong."""

    cdef object wrong(self, object error):
        """Keep what went wrong for the call that is being made. Ctrl-C and its like stay what they are."""
        cdef object kept = error
        if isinstance(error, Exception) and not isinstance(error, PluginError):
            kept = PluginError(self.name, f"{type(error).__name__}: {error}")
            kept.__cause__ = error
        self.error = kept


cdef void _tell(void *state, u32 page, int what) noexcept with gil:
    cdef Scripted p = <Scripted>state
    if p.error is not None:
        return
    try:
        if what == MADE:
            p.plugin.made(page)
        elif what == USED:
            p.plugin.used(page)
        else:
            p.plugin.gone(page)
    except BaseException as error:
        p.wrong(error)
        p.mmu.audit_found = p.mmu.audit_found or HOOK_RAISED


cdef void _made(void *state, u32 page) noexcept nogil:
    _tell(state, page, MADE)


cdef void _used(void *state, u32 page) noexcept nogil:
    _tell(state, page, USED)


cdef void _gone(void *state, u32 page) noexcept nogil:
    _tell(state, page, GONE)


cdef u32 _victim(void *state) noexcept with gil:
    cdef Scripted p = <Scripted>state
    if p.error is not None:
        return SC_PLUGIN_NO_PAGE
    try:
        answer = p.plugin.victim()
        if answer is None:
            return SC_PLUGIN_NO_PAGE
        try:
            number = operator.index(answer)
        except TypeError:
            raise PluginError(p.name, f"victim: the number of a page is needed, not {answer!r:.60}") from None
        if not 0 <= number < p.mmu.pool_pages:
            raise PluginError(p.name, f"victim: page {number} is not in use")
        return <u32>number
    except BaseException as error:
        p.wrong(error)
        p.mmu.audit_found = p.mmu.audit_found or HOOK_RAISED
        return SC_PLUGIN_NO_PAGE


cdef void scripted_policy(sc_policy_plugin *c) noexcept:
    memset(c, 0, sizeof(c[0]))
    c.struct_size = sizeof(c[0])
    c.made = _made
    c.used = _used
    c.gone = _gone
    c.victim = _victim


cdef int _store(void *state, const sc_table_store *store) noexcept with gil:
    """-1: it raised, or answered what is none."""
    cdef Scripted p = <Scripted>state
    cdef u32 i
    try:
        answer = p.plugin.store(TableStore(
            None if store.gva == ~<unsigned long long>0 else store.gva, store.gpa, store.gfn, store.nbytes,
            tuple([store.pages[i] for i in range(store.n_pages)]),
            tuple([store.levels[i] for i in range(store.n_pages)]), bool(store.in_use), bool(store.unsync),
        ))
        if not isinstance(answer, str) or answer not in ANSWERS:
            raise PluginError(p.name, f"store: one of {', '.join(ANSWERS)} is needed, not {answer!r:.60}")
        return ANSWERS.index(answer)
    except BaseException as error:
        p.wrong(error)
        return -1


cdef void scripted_decisions(sc_decisions_plugin *c) noexcept:
    memset(c, 0, sizeof(c[0]))
    c.struct_size = sizeof(c[0])
    c.store = _store
