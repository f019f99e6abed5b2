"""What design `nested` is made of; engine/designs/nested.pyx hangs it on the hooks of sc_design."""
