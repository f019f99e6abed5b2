"""Policies and decisions of other packages (shadowcore_plugin.h, shadowcore.plugins), told and asked."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u8, u32, u64
from shadowcore.plugins cimport sc_decisions_plugin, sc_plugin_host, sc_policy_plugin

cdef struct sc_plugged_policy:
    sc_policy_plugin c
    void *state
    bint begun                      # it knows the pages that there are
    u32 wrong                       # the page that it named last and that cannot go,
    int why                         # ... for it is not in use (1), or a root in use (2); 0: there is none

cdef struct sc_plugged_decisions:
    sc_decisions_plugin c
    void *state
    sc_mmu *mmu
    u32 *pages                      # room for pool_pages of them: those of the table that is asked about
    u8 *levels
    int answer                      # to what was asked last of a leaf table that may run out of sync, for
    u64 answered                    # ... this gfn, until it has been emulated; or all ones
    bint failed                     # it answered what is none: `answer`, or raised
    bint asks                       # the embedder is asked as well
    void *owner                     # PluggedDecisions

cdef class Plugged:
    cdef sc_mmu *mmu
    cdef readonly str name          # that settings call it by
    cdef object keeper              # the capsule, or the Scripted of a plug-in in Python
    cdef object error               # what the embedder raised
    cdef sc_plugin_host host        # what it sees
    cdef void *own                  # the structure with its functions
    cdef object take(self)
    cdef object show(self, object pages)
    cdef bytes save(self)
    cdef object restore(self, bytes state)
    cdef size_t saved(self, void *bytes_, size_t room) except? 0
    cdef int restored(self, const void *bytes_, size_t size) except -1

cdef class PluggedPolicy(Plugged):
    cdef sc_plugged_policy p

cdef class PluggedDecisions(Plugged):
    cdef sc_plugged_decisions d
    cdef object embedder            # Mmu.can_emulate, or None: asked where a store is to be emulated
    cdef object ask_too(self, object embedder)

cdef Plugged plug_policy(sc_mmu *mmu, str name, object plugin)
cdef Plugged plug_decisions(sc_mmu *mmu, str name, object plugin)
