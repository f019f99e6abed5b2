"""Policies and decisions in Python (shadowcore.plugins), told and asked at events that are slow anyway.

What they do wrong stops nothing half way. A policy that raises, or names a page that cannot go, is passed over (the
page that was made first goes), until the operation is whole and the call that made it raises PluginError. Decisions are
asked before a byte is stored: what they do wrong ends the operation, and nothing is stored.
"""
import operator

from shadowcore.engine.hooks cimport HOOK_RAISED
from shadowcore.engine.memory cimport SC_RUNNING, mem_frame, sc_no_frame
from shadowcore.engine.policies.queues cimport queue_oldest, queue_push, queue_remove
from shadowcore.engine.pool cimport hash_bucket, shadows
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64

from shadowcore.errors import PluginError
from shadowcore.plugins import ANSWERS, TableStore

cdef enum:
    MADE = 0
    USED = 1
    GONE = 2


cdef class Plugged:
    """A plug-in of one VM, and what it did wrong."""

    cdef object take(self):
        error, self.error = self.error, None
        return error

    cdef object wrong(self, object error):
        """Keep what went wrong for the call that is being made. Ctrl-C and its like stay what they are."""
        cdef object kept = error
        if isinstance(error, Exception) and not isinstance(error, PluginError):
            kept = PluginError(self.name, f"{type(error).__name__}: {error}")
            kept.__cause__ = error
        self.error = kept


cdef class PluggedPolicy(Plugged):
    """sc_policy.own of a policy in Python."""

    cdef int begin(self, u32 new) except -1:
        """Tell of the pages that there were before anything was told, but for `new`."""
        cdef u32 page = self.mmu.old
        if self.begun:
            return 0
        self.begun = True
        while page != SC_NONE:
            if page != new:
                self.plugin.made(page)
            page = self.mmu.pages[page].prev
        return 0

    cdef int tell(self, u32 page, int what) except -1:
        cdef bint first = not self.begun
        self.begin(page)
        if what == MADE or (first and what != MADE):
            self.plugin.made(page)
        if what == USED:
            self.plugin.used(page)
        elif what == GONE:
            self.plugin.gone(page)
        return 0

    cdef u32 ask(self) except? 0:
        cdef object number
        self.begin(SC_NONE)
        answer = self.plugin.victim()
        if answer is None:
            return SC_NONE
        try:
            number = operator.index(answer)
        except TypeError:
            raise PluginError(self.name, f"victim: the number of a page is needed, not {answer!r:.60}") from None
        if not 0 <= number < self.mmu.pool_pages or not self.mmu.pages[<u32>number].active:
            raise PluginError(self.name, f"victim: page {number} is not in use")
        if self.mmu.pages[<u32>number].root_count:
            raise PluginError(self.name, f"victim: page {number} is a root in use")
        return <u32>number


cdef void _tell(sc_mmu *mmu, u32 page, int what) noexcept with gil:
    cdef PluggedPolicy p = <PluggedPolicy>mmu.policy.own
    cdef int busy = mmu.mem.busy
    if p.error is not None:
        return
    mmu.mem.busy |= SC_RUNNING      # it may not use its VM
    try:
        p.tell(page, what)
    except BaseException as error:
        p.wrong(error)
        mmu.audit_found = mmu.audit_found or HOOK_RAISED
    finally:
        mmu.mem.busy = busy


cdef u32 _ask(sc_mmu *mmu) noexcept with gil:
    cdef PluggedPolicy p = <PluggedPolicy>mmu.policy.own
    cdef int busy = mmu.mem.busy
    if p.error is not None:
        return SC_NONE
    mmu.mem.busy |= SC_RUNNING
    try:
        return p.ask()
    except BaseException as error:
        p.wrong(error)
        mmu.audit_found = mmu.audit_found or HOOK_RAISED
        return SC_NONE
    finally:
        mmu.mem.busy = busy


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_push(mmu.policy.queues, 0, page, 0)
    _tell(mmu, page, MADE)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    _tell(mmu, page, USED)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_remove(mmu.policy.queues, page, 0)
    _tell(mmu, page, GONE)


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef u32 page = _ask(mmu)
    return queue_oldest(mmu.policy.queues, 0, 0) if page == SC_NONE else page


cdef Plugged plug_policy(sc_mmu *mmu, str name, object plugin):
    """Make `mmu` one of the policy `plugin`; what is returned has to live as long."""
    cdef PluggedPolicy p = PluggedPolicy()
    p.mmu = mmu
    p.name = name
    p.plugin = plugin
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
    return p


cdef class PluggedDecisions(Plugged):
    """sc_mmu.hook and sc_mmu.decider of decisions in Python."""

    cdef object ask(self, object gva, u64 gpa, u32 nbytes, bint unsync):
        """Its answer to a store to the table at gpa, which has a shadow."""
        cdef u64 gfn = gpa >> 12
        cdef u32 number = self.mmu.hash[hash_bucket(self.mmu, gfn)]
        cdef bint in_use = False
        cdef list pages = []
        cdef list levels = []
        while number != SC_NONE:
            if shadows(self.mmu, number, gfn):
                pages.append(number)
                levels.append(role_level(self.mmu.pages[number].role))
                in_use = in_use or self.mmu.pages[number].root_count != 0
            number = self.mmu.pages[number].hash_next
        answer = self.plugin.store(TableStore(gva, gpa, gfn, nbytes, tuple(pages), tuple(levels), in_use, unsync))
        if not isinstance(answer, str) or answer not in ANSWERS:
            raise PluginError(self.name, f"store: one of {', '.join(ANSWERS)} is needed, not {answer!r:.60}")
        if answer == "unprotect" and in_use or answer == "unsync" and not unsync:
            return "emulate"
        return answer


cdef int _decide(void *hook, u64 gva, u64 gpa, u32 nbytes) noexcept with gil:
    """sc_mmu.can_emulate: 1 yes, 0 unprotect, 2 zap and emulate, -1 an error."""
    cdef PluggedDecisions d = <PluggedDecisions>hook
    cdef sc_mmu *mmu = d.mmu
    cdef int busy = mmu.mem.busy
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    cdef bint own = True            # an error is the plug-in's
    answer = "emulate"
    mmu.mem.busy |= SC_RUNNING
    try:
        if frame != sc_no_frame() and mmu.frames[frame].shadowed:
            if d.answered is not None and d.answered == gpa >> 12:
                answer = d.answer
            else:
                answer = d.ask(gva, gpa, nbytes, False)
        d.answered = None
        own = False
        if answer == "unprotect" or (d.embedder is not None and not d.embedder(gva, gpa, nbytes)):
            return 0
        return 2 if answer == "zap" else 1
    except BaseException as error:
        if own:
            d.wrong(error)
        else:
            d.error = error
        return -1
    finally:
        mmu.mem.busy = busy


cdef bint _may_unsync(void *decider, u64 gfn) noexcept with gil:
    """sc_mmu.may_unsync. An error is raised once the operation is whole."""
    cdef PluggedDecisions d = <PluggedDecisions>decider
    cdef sc_mmu *mmu = d.mmu
    cdef int busy = mmu.mem.busy
    if d.error is not None:
        return True
    mmu.mem.busy |= SC_RUNNING
    try:
        d.answer = d.ask(None, gfn << 12, 0, True)
        d.answered = None if d.answer == "unsync" else gfn
        return d.answered is None
    except BaseException as error:
        d.wrong(error)
        mmu.audit_found = mmu.audit_found or HOOK_RAISED
        return True
    finally:
        mmu.mem.busy = busy


cdef Plugged plug_decisions(sc_mmu *mmu, str name, object plugin):
    """Have `mmu` ask `plugin` about stores to tables; what is returned has to live as long."""
    cdef PluggedDecisions d = PluggedDecisions()
    d.mmu = mmu
    d.name = name
    d.plugin = plugin
    mmu.hook = mmu.decider = <void *>d
    mmu.can_emulate = _decide
    mmu.may_unsync = _may_unsync
    return d
