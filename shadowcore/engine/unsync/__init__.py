"""What design `unsync` is made of; engine/designs/unsync.pyx hangs it on the hooks of sc_design."""
