from shadowcore.engine.emulate cimport *
