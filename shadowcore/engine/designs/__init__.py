"""What the designs do, each in a file; sc_design, in state.pxd, says at which events."""
