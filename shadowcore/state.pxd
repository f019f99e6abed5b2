from shadowcore.engine.features cimport *
from shadowcore.engine.flushes cimport *
from shadowcore.engine.hooks cimport *
from shadowcore.engine.page cimport *
from shadowcore.engine.quirks cimport *
from shadowcore.engine.role cimport *
from shadowcore.engine.state cimport *
