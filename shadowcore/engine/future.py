"""What is to come: how the shadow pages of a run will be used, for policy `optimal`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..config import Shadow


class Recorded(Protocol):
    """An Mmu that has recorded what its pages were used for."""

    def recorded_uses(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]: ...


NEVER = (1 << 64) - 1
"""The next use of what is not used any more."""
_ROOM = 1 << 14
"""Shadow pages, in a run that finds out: more than most guests ever use."""


class Future:
    """The uses of shadow pages in a run, in their order.

    keys: uint64, of each use the page, by a number that stands for its gfn and role.
    next_use: uint64, of each use the number of the next one of that page, or NEVER: there is none, or the guest's own
        doing zaps the page before it.
    by_key: uint64, the numbers of the uses, ordered by page and then by number.

    What the guest does, and so what is used, does not depend on the policy or the pool. A use is a walk of the
    processor that came through the page; walks one after the other through the same pages are one.
    """

    def __init__(
        self, keys: NDArray[Any], death: NDArray[Any] | None = None, death_at: NDArray[Any] | None = None
    ) -> None:
        self.keys = np.ascontiguousarray(keys, dtype=np.uint64)
        n = len(self.keys)
        order = np.lexsort((np.arange(n), self.keys))
        self.by_key = np.ascontiguousarray(order, dtype=np.uint64)
        ordered = self.keys[order]
        self.next_use = np.full(n, NEVER, dtype=np.uint64)
        again = np.flatnonzero(ordered[1:] == ordered[:-1])
        self.next_use[order[again]] = order[again + 1].astype(np.uint64)
        if death is None or death_at is None:
            return
        # The last use before a death has none after it, whatever comes later.
        at = np.searchsorted(ordered, death, side="left"), np.searchsorted(ordered, death, side="right")
        for first, last, when in zip(*at, np.asarray(death_at), strict=True):
            used = first + int(np.searchsorted(order[first:last], when))
            if used > first:
                self.next_use[order[used - 1]] = NEVER

    @classmethod
    def of(cls, mmu: Recorded) -> Future:
        """That of a run that has been made with VM(record_uses=True)."""
        return cls(*mmu.recorded_uses())

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Future({len(self)} uses of {len(np.unique(self.keys))} pages)"


def recorder_of(made: Shadow) -> Shadow:
    """The design with which a first run finds out what is to come for `made`: with more room, as what is recycled there
    is of no matter."""
    return dataclasses.replace(made, policy="fifo", pool_pages=max(made.pool_pages or 0, _ROOM))
