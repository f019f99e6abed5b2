from shadowcore.engine.bits cimport *
