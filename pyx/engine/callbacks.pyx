"""A Python function that is called at events, where they happen."""
from shadowcore.engine.exits cimport events_tell
from shadowcore.engine.hooks cimport EVENT_COUNT, HOOK_RAISED
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64

from shadowcore.errors import ConfigError

EVENTS = ("exit", "zap", "protect", "flush")
assert len(EVENTS) == EVENT_COUNT


cdef void _on_event(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept with gil:
    cdef EventHook hook = <EventHook>mmu.event_context
    cdef int busy = mmu.mem.busy
    if hook.mmu.hook_error is not None:
        return                      # one has raised, and its caller is not there yet
    mmu.mem.busy = True             # the callback may not use its VM
    try:
        hook.function(EVENTS[kind], detail, None if vcpu == SC_NONE else vcpu, address,
                      mmu.event_frames)
    except BaseException as error:
        hook.mmu.hook_error = error
        mmu.audit_found = HOOK_RAISED
    finally:
        mmu.mem.busy = busy


cdef class EventHook:
    """Calls function(kind, detail, vcpu, address, frames) at events of `mmu`; kept by it until there is another one."""
    cdef Mmu mmu
    cdef object function

    def __cinit__(self, Mmu mmu, function, kinds):
        mmu.idle()
        if not callable(function):
            raise ConfigError(f"on_event: a callable or None is needed, not {function!r}")
        for kind in kinds:
            if kind not in EVENTS:
                raise ConfigError(f"on_event: {kind!r} is not one of {', '.join(EVENTS)}")
        self.mmu = mmu
        self.function = function
        mmu.event_hook = self
        events_tell(mmu.c, sum(1 << EVENTS.index(kind) for kind in set(kinds)), _on_event, <void *>self)

    @staticmethod
    def remove(Mmu mmu) -> None:
        """No more events."""
        mmu.idle()
        events_tell(mmu.c, 0, NULL, NULL)
        mmu.event_hook = None
