from shadowcore.engine.counters cimport *
