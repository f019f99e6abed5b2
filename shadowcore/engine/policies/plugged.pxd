"""Policies and decisions in Python (shadowcore.plugins), told and asked."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

cdef class Plugged:
    cdef sc_mmu *mmu
    cdef readonly str name          # that settings call it by
    cdef object plugin              # the object that is told and asked
    cdef object error               # what it raised, or was wrong with its answer, until somebody takes it
    cdef object take(self)
    cdef object wrong(self, object error)

cdef class PluggedPolicy(Plugged):
    cdef bint begun                 # it knows the pages that there are
    cdef int begin(self, u32 new) except -1
    cdef int tell(self, u32 page, int what) except -1
    cdef u32 ask(self) except? 0

cdef class PluggedDecisions(Plugged):
    cdef public object embedder     # Mmu.can_emulate, or None: asked where a store is to be emulated
    cdef object answer              # to what was asked last of a leaf table that may run out of sync, for
    cdef object answered            # ... this gfn, until it has been emulated
    cdef object ask(self, object gva, u64 gpa, u32 nbytes, bint unsync)

cdef Plugged plug_policy(sc_mmu *mmu, str name, object plugin)
cdef Plugged plug_decisions(sc_mmu *mmu, str name, object plugin)
