from shadowcore.engine.mmu cimport *
