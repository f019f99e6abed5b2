"""What design `agile` is made of beside `cached`; engine/designs/agile.pyx hangs it on the hooks of sc_design."""
