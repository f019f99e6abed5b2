"""What a recording holds, and what it lacks: figures of one without fetches know nothing of faults on code pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Holdings = Mapping[str, Any]
"""By name: True or False, how many there are, or names of them."""

_WORDS = {
    "fetches": ("instruction fetches", "instruction fetches (exits for code pages are missing)"),
    "sizes": ("sizes of accesses", "sizes of accesses"),
    "cpl": ("CPL", "CPL (who is user is guessed by address)"),
    "efer": ("EFER loads", "EFER loads"),
    "invpcid": ("INVPCID", "INVPCID"),
    "pcids": ("PCIDs", "PCIDs"),
    "large_pages": ("large pages ({})", "large pages"),
    "marks": ("{:,} marks", "marks of phases"),
    "vcpus": ("{:,} vCPUs", "more than one vCPU"),
    "processes": ("{:,} processes", "more than one process"),
    "mappings": ("changes of mappings", "changes of mappings (all memory is taken for the program's image)"),
    "order": ("the order in which processes ran", "the order in which processes ran (they take turns)"),
    "values": ("values stored", "values stored"),
    "instructions": ("counts of instructions", "counts of instructions"),
    "kernel": ("accesses of the kernel", "accesses of the kernel (they are the model's)"),
}
"""By name, what it is called where it is there, {} being how many or which, and where it is not."""


def told(found: Holdings) -> str:
    """Two sentences: what there is, and what there is not."""
    there, lacking = [], []
    for name, value in found.items():
        has, lacks = _WORDS[name]
        several = value > 1 if type(value) is int and name in ("vcpus", "processes") else bool(value)
        if several:
            there.append(has.format(", ".join(value) if isinstance(value, (list, tuple)) else value))
        else:
            lacking.append(lacks)
    parts = [("The recording has", there), ("It lacks" if there else "The recording lacks", lacking)]
    return " ".join(f"{begin} {', '.join(words)}." for begin, words in parts if words)
