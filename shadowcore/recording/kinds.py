"""Records of a guest: their kinds, and bits of their flags. docs/recordings.md says what each means."""

LOAD_CR3, LOAD_CR, STORE, TABLE, INVLPG, ACCESS, TABLE_END, LOAD_EFER, INVPCID, MARK = range(1, 11)
"""Kinds of records."""
SNAPSHOT = 1 << 7
"""Flag of a STORE to a frame that does not serve as a table at that moment: see Recording.snapshot."""
WRITE, USER, FETCH, CPL_KNOWN = 1, 2, 4, 1 << 10
"""Flags of an ACCESS."""
