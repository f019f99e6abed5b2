"""What is known of a guest's recording only when all of it has been seen: where its workload begins, its direct map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kinds import ACCESS, CPL_KNOWN, LOAD_CR3, STORE, USER, WRITE

_OFFSETS_MAX = 1 << 16


class Survey:
    """What is known of a recording when all of its pieces have been seen, one after the other."""

    def __init__(self) -> None:
        self.first_user: int | None = None
        self.first_cr3: int | None = None
        self.operations = 0
        self._flagged = np.zeros(0, dtype=np.int64)  # user accesses whose next ones are not all known
        self._moved = np.zeros(0, dtype=np.bool_)
        self._offsets: dict[int, int] = {}

    def add(self, first: int, piece: Mapping[str, NDArray[Any]]) -> None:
        """piece: the columns of records from number `first` on."""
        self.operations = first + len(piece["kind"])
        if self.first_cr3 is None:
            record = first_of(piece["kind"] == LOAD_CR3)
            self.first_cr3 = None if record is None else first + record
        if self.first_user is None:
            user = (piece["kind"] == ACCESS) & (piece["flags"] & USER != 0)
            known = first_of(user & (piece["flags"] & CPL_KNOWN != 0))
            if known is not None:
                self.first_user = first + known
                user[known:] = False
            flagged = np.flatnonzero(user & (piece["flags"] & CPL_KNOWN == 0))
            self._moved = np.append(self._moved, piece["addr"][flagged] != piece["value"][flagged])
            self._flagged = np.append(self._flagged, flagged + first)
            self._find_user(len(self._flagged) - 15)
        carried = (piece["kind"][:-1] == ACCESS) & (piece["flags"][:-1] & WRITE != 0) & (piece["kind"][1:] == STORE)
        carried &= piece["value"][:-1] >> np.uint64(3) == piece["addr"][1:] >> np.uint64(3)
        offsets, counts = np.unique((piece["addr"] - piece["value"])[:-1][carried], return_counts=True)
        for offset, count in zip(offsets.tolist(), counts.tolist(), strict=True):
            self._offsets[offset] = self._offsets.get(offset, 0) + count
        if len(self._offsets) > _OFFSETS_MAX:
            # A guest has few mappings of its tables: no more than memory allows are told apart.
            most = sorted(self._offsets, key=lambda offset: -self._offsets[offset])[: _OFFSETS_MAX // 2]
            self._offsets = {offset: self._offsets[offset] for offset in most}

    def end(self) -> None:
        if self.first_user is None:
            self._find_user(len(self._flagged))

    def _find_user(self, known: int) -> None:
        """Look at the first `known` of the flagged accesses, and forget them."""
        if known <= 0:
            return
        before = np.append(0, np.cumsum(self._moved))
        begins = np.arange(known)
        ends = np.minimum(begins + 16, len(self._flagged))
        most = 2 * (before[ends] - before[begins]) > ends - begins
        found = first_of(self._moved[:known] & most)
        self.first_user = None if found is None else int(self._flagged[found])
        self._flagged, self._moved = self._flagged[known:], self._moved[known:]

    @property
    def direct_map(self) -> int:
        offsets = self._offsets
        return min(offsets, key=lambda offset: (-offsets[offset], offset)) if offsets else 0xFFFF_8880_0000_0000


def first_of(mask: NDArray[np.bool_]) -> int | None:
    """Number of the first element that is true."""
    index = int(mask.argmax()) if len(mask) else 0
    return index if len(mask) and mask[index] else None
