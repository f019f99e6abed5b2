from shadowcore.engine.types cimport *
