from shadowcore.engine.registers cimport *
