from shadowcore.engine.access cimport *
