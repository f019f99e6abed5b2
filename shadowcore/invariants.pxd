from shadowcore.engine.invariants cimport *
