from shadowcore.engine.state cimport *
