from shadowcore.engine.tlb cimport *
