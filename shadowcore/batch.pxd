"""Batches of operations."""
from shadowcore.mmu cimport Mmu
from shadowcore.types cimport u32

cdef object run_batch(Mmu shell, u32 number, object ops, bint data)
