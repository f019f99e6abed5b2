"""A small guest kernel, whose processes edit their own page tables."""
