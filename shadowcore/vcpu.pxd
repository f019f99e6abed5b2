from shadowcore.engine.vcpu cimport *
