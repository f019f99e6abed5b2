"""Policies and decisions in Python (shadowcore.plugins), behind the functions that compiled ones have."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.plugins cimport sc_decisions_plugin, sc_policy_plugin

cdef class Scripted:
    cdef sc_mmu *mmu
    cdef readonly str name          # that settings call it by
    cdef object plugin              # the object that is told and asked
    cdef object error               # what it raised, or was wrong with its answer, until somebody takes it
    cdef object wrong(self, object error)

# The functions: their state is a Scripted.
cdef void scripted_policy(sc_policy_plugin *c) noexcept
cdef void scripted_decisions(sc_decisions_plugin *c) noexcept
