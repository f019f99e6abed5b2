"""Shadow pages, their entries and the exits, in words: what `explain` and `show` say in the same way."""

from __future__ import annotations

from typing import Any

from ..engine.machine import VM
from ..pagetables import NX, PS, A, D, P, U, W

ADDRESS = 0x000F_FFFF_FFFF_F000
"""Bits of an spte that hold the address of a frame."""
_GUEST_W, _GUEST_U = 1 << 10, 1 << 11

EXITS = {
    "fill": "a page fault exit: the shadow has no entry for what the guest maps",
    "write": "a page fault exit: the shadow's leaf grants less than the guest does",
    "emulate": "a page fault exit: the emulator has to do the store, for its frame is a guest table with a shadow page",
    "guest": "a page fault exit: the fault is the guest's own, and is injected",
    "mmio": "a page fault exit: the gpa is in no memory slot, a device has to serve it",
}
"""Why control leaves the guest at an access."""


def target(vm: VM, level: int, entry: int, pages: dict[int, Any]) -> tuple[int | None, str]:
    """The page that an entry leads to, and that in words."""
    if not entry & P:
        return None, "ends the walk: " + ("it remembers a device" if entry and level == 1 else "nothing is there yet")
    if level > 1 and not entry & PS:
        child = (entry & ADDRESS) - vm.memory.pool_hpa >> 12
        return child, f"leads to shadow page {child}" + ("" if child in pages else ", which is none: a broken link")
    gfn = gfn_of(vm, ((entry & ADDRESS) - vm.memory.ram_hpa) >> 12)
    size = {1: "4 KiB", 2: "2 MiB", 3: "1 GiB"}.get(level, "?")
    return None, f"maps hfn {(entry & ADDRESS) >> 12:#x}, which is gfn {gfn:#x} ({size})"


def gfn_of(vm: VM, frame: int) -> int:
    """The gfn of a frame of guest RAM that a memory slot maps; else the frame's own number."""
    for slot in vm.memory.slots:
        if slot is not None:
            first = slot.gpa >> 12
            index = frame - vm.memory.frame(first)
            if 0 <= index < int(slot.size) >> 12:
                return first + index
    return frame


def write_protected(before: int, now: int) -> bool:
    """A shadow entry is as it was, but that it lost W."""
    return bool(before & now & P and before & ~now & W) and not (before ^ now) & ADDRESS


def bits_set(before: int, now: int) -> str:
    """Of A and D those that an entry of the guest's has got, as "A and D"; "" if none."""
    return " and ".join(name for name, bit in (("A", A), ("D", D)) if now & ~before & bit)


UNSYNC, IN_SYNC = "becomes unsync: stores to its guest table go unseen until the next flush", "is in sync again"
"""What becomes of a shadow page."""


def role_words(page: Any) -> str:
    """What a shadow page stands for, in words."""
    rights = "".join(letter if int(page["access"]) & bit else "-" for letter, bit in (("x", 1), ("w", 2), ("u", 4)))
    what = "direct" if page["direct"] else "guest table"
    words = [f"{what} at gfn {int(page['gfn']):#x}, level {int(page['level'])}, access {rights}"]
    words += [f"quadrant {int(page['quadrant'])}"] if page["quadrant"] else []
    words += [name for name in ("nxe", "wp0", "unsync") if page[name]]
    return ", ".join(words)


def spte_words(level: int, entry: int) -> tuple[str, ...]:
    if not entry & P:
        return ("not present",)
    if level > 1 and not entry & PS:
        return ("present", "grants everything")
    words = ["present", "writable" if entry & W else "read only", "user" if entry & U else "supervisor only"]
    words += ["not executable"] if entry & NX else []
    if entry & _GUEST_W and not entry & W:
        words.append("the guest allows writes: write access is withheld")
    if entry & _GUEST_U and not entry & U:
        words.append("the guest allows user access")
    return tuple(words)
