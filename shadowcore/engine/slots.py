"""Memory slots: where they may lie, in guest physical space and in guest RAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PAGE_SIZE, MemorySlot, taken
from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_SLOTS = 32
"""Slots of a VM at most: SC_MAX_SLOTS."""
GPA_END = 1 << 52


def offsets(slots: Iterable[MemorySlot | None]) -> list[int]:
    """The byte of guest RAM at which the frames of each slot begin; of a number that is free, where those before it
    end."""
    found, at = [], 0
    for slot in slots:
        if slot is not None and slot.offset is not None:
            at = slot.offset
        found.append(at)
        at += int(slot.size) if slot is not None else 0
    return found


def checked_slots(slots: Iterable[MemorySlot | None]) -> tuple[MemorySlot | None, ...]:
    """The slots as a tuple; ConfigError unless each is a MemorySlot, or None for a number that is free, and no two
    overlap, neither in guest physical space nor in guest RAM."""
    slots = tuple(slots)
    if not 1 <= len(slots) <= MAX_SLOTS:
        raise ConfigError(f"memory slots: 1 to {MAX_SLOTS} are allowed, not {len(slots)}")
    checked = [None if slot is None else taken(MemorySlot, slot, "memory slots") for slot in slots]
    for number, slot in enumerate(checked):
        if slot is not None:
            check_place(checked[:number], number, slot, "memory slots")
    at = zip(offsets(checked), checked, strict=True)
    end = 0
    for first, size in sorted((first, int(slot.size)) for first, slot in at if slot is not None):
        if first < end:
            raise ConfigError(f"memory slots: frames from byte {first} of guest RAM on belong to two of them")
        end = first + size
    return tuple(checked)


def check_place(slots: Sequence[MemorySlot | None], number: int, new: MemorySlot, name: str = "slot.gpa") -> None:
    """ConfigError unless slot `number` can be `new`, beside the others of `slots`."""
    size = int(new.size)
    if new.gpa + size > GPA_END:
        raise ConfigError(f"{name}: the slot at {new.gpa:#x} ends beyond 52 address bits")
    for other, slot in enumerate(slots):
        if slot is not None and other != number and slot.gpa < new.gpa + size and new.gpa < slot.gpa + int(slot.size):
            raise ConfigError(
                f"{name}: {size} bytes at {new.gpa:#x} overlap slot {other}, {slot.size} bytes at {slot.gpa:#x}"
            )


def free_place(used: Iterable[tuple[int, int]], ram: int, new: MemorySlot) -> int:
    """The frame of guest RAM, of `ram` frames, at which those of `new` can begin; ConfigError if there is none. used:
    frames of the other slots, each (first, end)."""
    n = int(new.size) // PAGE_SIZE
    if new.offset is not None:
        first = new.offset // PAGE_SIZE
        if first + n > ram:
            raise ConfigError(
                f"slot.offset: {new.size} bytes from {new.offset} on end beyond guest RAM, which has {ram * PAGE_SIZE}"
            )
        for begin, end in used:
            if begin < first + n and first < end:
                raise ConfigError(
                    f"slot.offset: {new.size} bytes from {new.offset} on overlap those of a slot,"
                    f" {begin * PAGE_SIZE} to {end * PAGE_SIZE}"
                )
        return first
    first = 0
    for begin, end in sorted(used):
        if begin - first >= n:
            break
        first = end
    if first + n > ram:
        raise ConfigError(
            f"slot.size: no {new.size} bytes of guest RAM in one piece are free; `memory` said how much there is,"
            f" {ram * PAGE_SIZE}"
        )
    return first
