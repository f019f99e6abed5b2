"""Audits on demand and at named points."""
from shadowcore.engine.invariants cimport sc_audit
from shadowcore.engine.mmu cimport Mmu

cdef class AuditPoints:
    cdef sc_audit c                 # what the first audit found that found something
    cdef Mmu mmu
