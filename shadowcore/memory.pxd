from shadowcore.engine.memory cimport *
