"""Which shadow page is recycled, a file for each policy; sc_policy, in state.pxd, says what one decides."""
