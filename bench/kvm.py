"""What the real code of January 2007 costs, in nanoseconds, with its data in cache and without VM exits.

A full page walk in C took WALK_NS on the same machine. Divided by it, the figures say how many such walks the
code costs, and that holds on other machines too.
"""

WALK_NS = 6.0

LEAF = {"64": 38, "pae": 26, "32": 26}
DIRTY = {"64": 32, "pae": 20, "32": 19}
PRESENT = {"64": 28, "pae": 16, "32": 16}
STORE = {"64": 69, "pae": 45, "32": 43}
NEW_TABLE = 46  # without its scan of the table for zeros, a debugging aid
RECYCLED = 356  # likewise
CR3 = {"64": 10, "pae": 30, "32": 29}
ZAP = {"64": 1000, "pae": 1000, "32": 2000}
SHARED = 1100  # a fault on a frame with 4096 mappings, the lower of two figures


def in_walks(nanoseconds: float) -> dict[str, object]:
    """Arguments of a comparison with so many nanoseconds of KVM's."""
    return {"factor": nanoseconds / WALK_NS, "named": f"KVM: {nanoseconds / WALK_NS:.1f} walks"}
