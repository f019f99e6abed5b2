from shadowcore.engine.batch cimport *
