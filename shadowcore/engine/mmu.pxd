"""The class Mmu, and the functions of the MMU that are published."""
from shadowcore.engine.counters cimport Stats, sc_stats
from shadowcore.engine.history cimport sc_histories
from shadowcore.engine.memory cimport Memory
from shadowcore.engine.policies.queues cimport sc_queues
from shadowcore.engine.policies.recorder cimport sc_references
from shadowcore.engine.recorded cimport Kept
from shadowcore.engine.state cimport sc_event_ring, sc_exit_log, sc_mmu, sc_reference_hook, sc_vcpu, sc_walk_log
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk
from shadowcore.engine.watch cimport sc_watch

cdef int mmu_resolve(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil
cdef void mmu_new_cr3(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void mmu_reset(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
cdef void mmu_invlpg(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil
cdef void mmu_protect_slot(sc_mmu *mmu, int slot) noexcept nogil
# hook is told of the references of every walk, until there is another, or NULL. ConfigError: mmu is no Mmu.
cdef int mmu_listen(object mmu, sc_reference_hook hook, void *context) except -1

cdef class Mmu:
    cdef sc_mmu *c                  # its own; outside of the object, whose size other modules are compiled with
    cdef sc_stats counters
    cdef readonly Memory memory
    cdef readonly Stats stats
    cdef readonly object design     # Native, Shadow or Nested
    cdef object _arrays             # what c points into
    cdef object _marks              # ... where the processor walks the guest's tables
    cdef list _vcpus                # kept alive as long as c points into them
    cdef object _can_emulate        # callable behind c.can_emulate, or None
    cdef object hook_error          # what a callback, or the handler of a signal, raised
    cdef sc_watch watch             # behind c.watch, between enter and leave
    cdef bint _general              # no fast path is taken
    cdef object audits              # AuditPoints, once points have been named
    cdef sc_event_ring ring         # behind c.ring
    cdef Kept _events               # what it holds
    cdef object event_hook          # keeps what c.event_context points to
    cdef sc_queues books            # behind c.policy.queues
    cdef dict _books                # the arrays of books, by name
    cdef object _future             # what books.future points into, or None
    cdef sc_histories histories     # behind c.histories
    cdef sc_references references   # uses of pages, if they are recorded
    cdef sc_walk_log walk_log       # behind c.walks
    cdef Kept _walked               # the references in it
    cdef sc_exit_log exit_log       # behind c.exits
    cdef Kept _exits                # the rows in it
    cdef object _policy             # plugged.PluggedPolicy behind c.policy.own, or None
    cdef object _decides            # plugged.PluggedDecisions behind c.decider, or None

    cdef int idle(self) except -1
    cdef int enter(self, bint unsettled=*) except -1
    cdef void leave(self) noexcept
    cdef object stopped(self)
    cdef object failure(self, int rc)
    cdef list _list(self, u32 head)
    cdef void *_array(self, u64 nbytes) except NULL
    cdef int _prepare_unsync(self, design) except -1
    cdef int _prepare_adaptive(self, design) except -1
    cdef int _prepare_policy(self, design, future) except -1
    cdef int _prepare_agile(self, design) except -1
    cdef object _book_words(self)
    cdef int still(self) except -1
    cdef dict _windows(self, what, lender)
