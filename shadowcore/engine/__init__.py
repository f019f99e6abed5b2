"""One machine: memory, the walk, structures, the processor, audits, and the classes that own them."""
