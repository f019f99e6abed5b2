from shadowcore.engine.walker cimport *
