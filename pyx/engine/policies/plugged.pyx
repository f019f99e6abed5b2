"""Policies and decisions of other packages, told and asked at events that are slow anyway: functions in a capsule
(shadowcore_plugin.h), or those of scripted.pyx for classes in Python (shadowcore.plugins).

What they do wrong stops nothing half way. A policy that names a page that cannot go is passed over (the page that was
made first goes), until the operation is whole and the call that made it raises PluginError. Decisions are asked before
a byte is stored: what they do wrong ends the operation, and nothing is stored.
"""
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetName, PyCapsule_GetPointer, PyCapsule_IsValid
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from shadowcore.engine.check cimport sc_check
from shadowcore.engine.hooks cimport HOOK_RAISED
from shadowcore.engine.memory cimport SC_RUNNING, mem_frame, sc_no_frame
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.policies.queues cimport queue_oldest, queue_push, queue_remove
from shadowcore.engine.policies.scripted cimport Scripted, scripted_decisions, scripted_policy
from shadowcore.engine.pool cimport hash_bucket, shadows
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u8, u32, u64
from shadowcore.plugins cimport (
    SC_DECIDE_EMULATE, SC_DECIDE_UNPROTECT, SC_DECIDE_UNSYNC, SC_DECIDE_ZAP, SC_DECISIONS_CAPSULE, SC_PLUGIN_FAILED,
    SC_PLUGIN_NO_PAGE, SC_PLUGIN_STATE_MAX, SC_POLICY_CAPSULE, sc_plugin_page, sc_table_store,
)

from shadowcore.errors import ConfigError, PluginError

cdef enum:
    STRUCT_MOST = 4096              # bytes of a structure of functions, of whatever version

sc_check(SC_PLUGIN_NO_PAGE == SC_NONE)
# The fields of the header that plug-ins see.
sc_check(sizeof(sc_plugin_page) == <size_t>&(<sc_page *>NULL).flood + 1)
sc_check(<size_t>&(<sc_plugin_page *>NULL).root_count == <size_t>&(<sc_page *>NULL).root_count)
sc_check(<size_t>&(<sc_plugin_page *>NULL).present == <size_t>&(<sc_page *>NULL).present)
sc_check(<size_t>&(<sc_plugin_page *>NULL).active == <size_t>&(<sc_page *>NULL).active)
sc_check(<size_t>&(<sc_plugin_page *>NULL).unsync == <size_t>&(<sc_page *>NULL).unsync)


cdef class Plugged:
    """A plug-in of one VM, and what it did wrong."""

    cdef object take(self):
        """What it did wrong, or None; and it is forgotten."""
        cdef object error = self.error
        self.error = None
        if error is None and isinstance(self.keeper, Scripted):
            error = (<Scripted>self.keeper).error
            (<Scripted>self.keeper).error = None
        return error

    cdef object show(self, object pages):
        if isinstance(self.keeper, Scripted):
            (<Scripted>self.keeper).plugin.pages = pages

    cdef size_t saved(self, void *bytes_, size_t room) except? 0:
        raise NotImplementedError

    cdef int restored(self, const void *bytes_, size_t size) except -1:
        raise NotImplementedError

    cdef bytes save(self):
        """Its state, for a file. ConfigError if it does not say that, PluginError for what it does wrong."""
        cdef size_t size
        cdef bytearray room
        if isinstance(self.keeper, Scripted):
            plugin = (<Scripted>self.keeper).plugin
            try:
                return bytes(memoryview(plugin.state()).cast("B"))
            except NotImplementedError:
                raise ConfigError(f"save: {self.name!r} cannot be saved, for {type(plugin).__qualname__} keeps what it "
                                  "is told and has no method `state`") from None
            except Exception as error:
                raise PluginError(self.name, f"state: {type(error).__name__}: {error}") from error
        size = self.saved(NULL, 0)
        if size > SC_PLUGIN_STATE_MAX:
            raise PluginError(self.name, "save: it failed" if size == SC_PLUGIN_FAILED else f"save: {size} bytes")
        room = bytearray(size + 1)
        if self.saved(<char *>room, size) != size:
            raise PluginError(self.name, "save: it said another number of bytes than before")
        return bytes(room[:size])

    cdef object restore(self, bytes state):
        """Of a new one: go on from what another has saved. PluginError where it takes them for none."""
        if not isinstance(self.keeper, Scripted):
            if self.restored(<const char *>state, len(state)):
                raise PluginError(self.name, f"restore: {len(state)} bytes are no state of it")
            return
        try:
            (<Scripted>self.keeper).plugin.restore(state)
        except Exception as error:
            raise PluginError(self.name, f"restore: {type(error).__name__}: {error}") from error


cdef int _copied(object capsule, const char *wanted, str name, str kind, void *into, size_t size) except -1:
    """The structure in a capsule, of as many bytes as are known here. ConfigError for what is none."""
    cdef const u8 *given
    cdef const char *found
    cdef u32 bytes_
    cdef size_t i
    if not PyCapsule_IsValid(capsule, wanted):
        found = PyCapsule_GetName(capsule)
        said = "one without a name" if found == NULL else repr((<bytes>found).decode("utf-8", "replace"))
        raise ConfigError(f"{name!r}: a capsule of the name {(<bytes>wanted).decode()!r} is needed, not {said}")
    given = <const u8 *>PyCapsule_GetPointer(capsule, wanted)
    bytes_ = (<const u32 *>given)[0]
    if not size <= bytes_ <= STRUCT_MOST:
        raise ConfigError(f"{name!r}: {kind}.struct_size is {bytes_}, and {size} to {STRUCT_MOST} are needed")
    for i in range(size, bytes_):
        if given[i]:
            raise ConfigError(f"{name!r}: {kind} has {bytes_} bytes, and something in those that this version does not "
                              f"know: it has {size}")
    memcpy(into, given, size)
    if (<const u32 *>into)[1]:
        raise ConfigError(f"{name!r}: {kind}.reserved is not 0")
    return 0


cdef int _has(str name, str kind, dict functions) except -1:
    for function, address in functions.items():
        if address == 0 and function not in ("save", "restore"):
            raise ConfigError(f"{name!r}: {kind}.{function} is NULL")
    if (functions["save"] == 0) != (functions["restore"] == 0):
        raise ConfigError(f"{name!r}: {kind}.save and restore: one of them is NULL")
    return 0


cdef int _host(Plugged plugged, sc_mmu *mmu, str name) except -1:
    """What it sees. The pages are there when it is plugged, and before it is opened."""
    plugged.mmu = mmu
    plugged.name = name
    memset(&plugged.host, 0, sizeof(plugged.host))
    plugged.host.struct_size = sizeof(plugged.host)
    plugged.host.pool_pages = mmu.pool_pages
    plugged.host.pages = mmu.pages
    plugged.host.page_size = sizeof(sc_page)
    return 0


cdef Scripted _scripted(sc_mmu *mmu, str name, object plugin):
    cdef Scripted s = Scripted()
    s.mmu = mmu
    s.name = name
    s.plugin = plugin
    return s


# Policies

cdef class PluggedPolicy(Plugged):
    """Behind sc_policy.own."""

    def __dealloc__(self):
        if self.p.state != NULL and self.p.c.close != NULL:
            self.p.c.close(self.p.state)

    cdef object take(self):
        cdef int why = self.p.why
        self.p.why = 0
        if why:
            return PluginError(self.name, f"victim: page {self.p.wrong} is "
                                          + ("not in use" if why == 1 else "a root in use"))
        return Plugged.take(self)

    cdef bytes save(self):
        """It is told of all pages before: so who restores it knows them."""
        cdef int busy = self.mmu.mem.busy
        self.mmu.mem.busy |= SC_RUNNING
        try:
            _begin(self.mmu, &self.p, SC_NONE)
            error = self.take()
            if error is not None:
                raise error
            return Plugged.save(self)
        finally:
            self.mmu.mem.busy = busy

    cdef object restore(self, bytes state):
        Plugged.restore(self, state)
        self.p.begun = True

    cdef size_t saved(self, void *bytes_, size_t room) except? 0:
        if self.p.c.save == NULL:
            raise ConfigError(f"save: {self.name!r} cannot be saved, for sc_policy_plugin.save is NULL")
        return self.p.c.save(self.p.state, bytes_, room)

    cdef int restored(self, const void *bytes_, size_t size) except -1:
        return self.p.c.restore == NULL or self.p.c.restore(self.p.state, bytes_, size) != 0


cdef void _begin(sc_mmu *mmu, sc_plugged_policy *p, u32 new) noexcept nogil:
    """Tell of the pages that there were before anything was told, but for `new`."""
    cdef u32 page = mmu.old
    if p.begun:
        return
    p.begun = True
    while page != SC_NONE:
        if page != new:
            p.c.made(p.state, page)
        page = mmu.pages[page].prev


cdef void _tell(sc_mmu *mmu, u32 page, void (*function)(void *, u32) noexcept nogil) noexcept nogil:
    """Of what happened to a page: by function `made`, NULL, or another one."""
    cdef sc_plugged_policy *p = <sc_plugged_policy *>mmu.policy.own
    cdef int busy = mmu.mem.busy
    mmu.mem.busy |= SC_RUNNING      # it may not use its VM
    if not p.begun:
        _begin(mmu, p, page)
        p.c.made(p.state, page)
        if function == p.c.made:
            function = NULL
    if function != NULL:
        function(p.state, page)
    mmu.mem.busy = busy


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_push(mmu.policy.queues, 0, page, 0)
    _tell(mmu, page, (<sc_plugged_policy *>mmu.policy.own).c.made)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    _tell(mmu, page, (<sc_plugged_policy *>mmu.policy.own).c.used)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_remove(mmu.policy.queues, page, 0)
    _tell(mmu, page, (<sc_plugged_policy *>mmu.policy.own).c.gone)


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef sc_plugged_policy *p = <sc_plugged_policy *>mmu.policy.own
    cdef int busy = mmu.mem.busy
    cdef u32 page = SC_NONE
    if not p.why:
        mmu.mem.busy |= SC_RUNNING
        _begin(mmu, p, SC_NONE)
        page = p.c.victim(p.state)
        mmu.mem.busy = busy
        if page != SC_NONE and (page >= mmu.pool_pages or not mmu.pages[page].active or mmu.pages[page].root_count):
            p.why = 2 if page < mmu.pool_pages and mmu.pages[page].active else 1
            p.wrong = page
            mmu.audit_found = mmu.audit_found or HOOK_RAISED
            page = SC_NONE
    return queue_oldest(mmu.policy.queues, 0, 0) if page == SC_NONE else page


cdef Plugged plug_policy(sc_mmu *mmu, str name, object plugin):
    """Make `mmu` one of the policy `plugin`; what is returned has to live as long, and `own` of it to be sc_policy.own
    before anything is told."""
    cdef PluggedPolicy policy = PluggedPolicy()
    cdef sc_plugged_policy *p = &policy.p
    memset(p, 0, sizeof(p[0]))
    _host(policy, mmu, name)
    if PyCapsule_CheckExact(plugin):
        policy.keeper = plugin
        _copied(plugin, SC_POLICY_CAPSULE, name, "sc_policy_plugin", &p.c, sizeof(p.c))
        _has(name, "sc_policy_plugin", {"open": <size_t>p.c.open, "close": <size_t>p.c.close, "made": <size_t>p.c.made,
                                        "gone": <size_t>p.c.gone, "victim": <size_t>p.c.victim,
                                        "save": <size_t>p.c.save, "restore": <size_t>p.c.restore})
        p.state = p.c.open(&policy.host)
        if p.state == NULL:
            raise ConfigError(f"{name!r}: sc_policy_plugin.open made nothing")
    else:
        policy.keeper = _scripted(mmu, name, plugin)
        scripted_policy(&p.c)
        p.state = <void *>policy.keeper
    policy.own = p
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
    return policy


# Decisions

cdef class PluggedDecisions(Plugged):
    """Behind sc_mmu.hook and sc_mmu.decider."""

    def __dealloc__(self):
        if self.d.state != NULL and self.d.c.close != NULL:
            self.d.c.close(self.d.state)
        free(self.d.pages)
        free(self.d.levels)

    cdef object take(self):
        cdef bint failed = self.d.failed
        self.d.failed = False
        error = Plugged.take(self)
        if error is None and failed:
            error = PluginError(self.name, f"store: 0 to {SC_DECIDE_ZAP} is needed, not {self.d.answer}")
        return error

    cdef object ask_too(self, object embedder):
        self.embedder = embedder
        self.d.asks = embedder is not None

    cdef size_t saved(self, void *bytes_, size_t room) except? 0:
        if self.d.c.save == NULL:
            raise ConfigError(f"save: {self.name!r} cannot be saved, for sc_decisions_plugin.save is NULL")
        return self.d.c.save(self.d.state, bytes_, room)

    cdef int restored(self, const void *bytes_, size_t size) except -1:
        return self.d.c.restore == NULL or self.d.c.restore(self.d.state, bytes_, size) != 0


cdef int _ask(sc_plugged_decisions *d, u64 gva, u64 gpa, u32 nbytes, bint unsync) noexcept nogil:
    """Its answer to a store to the table at gpa, which has a shadow, as far as that can be done; -1: it is none."""
    cdef sc_mmu *mmu = d.mmu
    cdef int busy = mmu.mem.busy
    cdef u64 gfn = gpa >> 12
    cdef u32 number = mmu.hash[hash_bucket(mmu, gfn)]
    cdef sc_table_store store
    memset(&store, 0, sizeof(store))
    store.struct_size = sizeof(store)
    store.nbytes = nbytes
    store.gva = gva
    store.gpa = gpa
    store.gfn = gfn
    store.pages = d.pages
    store.levels = d.levels
    store.unsync = unsync
    while number != SC_NONE and store.n_pages < mmu.pool_pages:
        if shadows(mmu, number, gfn):
            d.pages[store.n_pages] = number
            d.levels[store.n_pages] = <u8>role_level(mmu.pages[number].role)
            store.n_pages += 1
            store.in_use |= mmu.pages[number].root_count != 0
        number = mmu.pages[number].hash_next
    mmu.mem.busy |= SC_RUNNING
    d.answer = d.c.store(d.state, &store)
    mmu.mem.busy = busy
    if not 0 <= d.answer <= SC_DECIDE_ZAP:
        d.failed = True
        return -1
    if (d.answer == SC_DECIDE_UNPROTECT and store.in_use) or (d.answer == SC_DECIDE_UNSYNC and not unsync):
        d.answer = SC_DECIDE_EMULATE
    return d.answer


cdef int _embedder(sc_plugged_decisions *d, u64 gva, u64 gpa, u32 nbytes) noexcept with gil:
    """1: the embedder has it emulated; 0: not; -1: it raised."""
    cdef PluggedDecisions owner = <PluggedDecisions>d.owner
    cdef int busy = d.mmu.mem.busy
    d.mmu.mem.busy |= SC_RUNNING
    try:
        return 1 if owner.embedder(gva, gpa, nbytes) else 0
    except BaseException as error:
        owner.error = error
        return -1
    finally:
        d.mmu.mem.busy = busy


cdef int _decide(void *hook, u64 gva, u64 gpa, u32 nbytes) noexcept nogil:
    """sc_mmu.can_emulate: 1 yes, 0 unprotect, 2 zap and emulate, -1 an error."""
    cdef sc_plugged_decisions *d = <sc_plugged_decisions *>hook
    cdef u64 frame = mem_frame(d.mmu.mem, gpa >> 12)
    cdef int answer = SC_DECIDE_EMULATE
    cdef int told
    if frame != sc_no_frame() and d.mmu.frames[frame].shadowed:
        answer = d.answer if d.answered == gpa >> 12 else _ask(d, gva, gpa, nbytes, False)
    d.answered = ~<u64>0
    if answer == -1 or answer == SC_DECIDE_UNPROTECT:
        return 0 if answer == SC_DECIDE_UNPROTECT else -1
    if d.asks:
        told = _embedder(d, gva, gpa, nbytes)
        if told <= 0:
            return told
    return 2 if answer == SC_DECIDE_ZAP else 1


cdef int _may_unsync(void *decider, u64 gfn) noexcept nogil:
    """sc_mmu.may_unsync. An error is raised once the operation is whole; until then nothing is asked."""
    cdef sc_plugged_decisions *d = <sc_plugged_decisions *>decider
    cdef int answer
    if d.failed:
        return True
    answer = _ask(d, ~<u64>0, gfn << 12, 0, True)
    if answer == -1:
        d.mmu.audit_found = d.mmu.audit_found or HOOK_RAISED
        return True
    d.answered = ~<u64>0 if answer == SC_DECIDE_UNSYNC else gfn
    return answer == SC_DECIDE_UNSYNC


cdef Plugged plug_decisions(sc_mmu *mmu, str name, object plugin):
    """Have `mmu` ask `plugin` about stores to tables; what is returned has to live as long."""
    cdef PluggedDecisions decisions = PluggedDecisions()
    cdef sc_plugged_decisions *d = &decisions.d
    memset(d, 0, sizeof(d[0]))
    _host(decisions, mmu, name)
    d.mmu = mmu
    d.owner = <void *>decisions
    d.answered = ~<u64>0
    d.pages = <u32 *>malloc(max(1, mmu.pool_pages) * sizeof(u32))
    d.levels = <u8 *>malloc(max(1, mmu.pool_pages))
    if d.pages == NULL or d.levels == NULL:
        raise MemoryError
    if PyCapsule_CheckExact(plugin):
        decisions.keeper = plugin
        _copied(plugin, SC_DECISIONS_CAPSULE, name, "sc_decisions_plugin", &d.c, sizeof(d.c))
        _has(name, "sc_decisions_plugin", {"open": <size_t>d.c.open, "close": <size_t>d.c.close,
                                           "store": <size_t>d.c.store, "save": <size_t>d.c.save,
                                           "restore": <size_t>d.c.restore})
        d.state = d.c.open(&decisions.host)
        if d.state == NULL:
            raise ConfigError(f"{name!r}: sc_decisions_plugin.open made nothing")
    else:
        decisions.keeper = _scripted(mmu, name, plugin)
        scripted_decisions(&d.c)
        d.state = <void *>decisions.keeper
    decisions.own = d
    mmu.hook = mmu.decider = d
    mmu.can_emulate = _decide
    mmu.may_unsync = _may_unsync
    return decisions
