"""What is known of a guest's recording only when all of it has been seen: where its workload begins, its direct map,
what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kinds import ACCESS, CPL_KNOWN, FETCH, INVPCID, LOAD_CR, LOAD_CR3, LOAD_EFER, MARK, STORE, USER, WRITE

_OFFSETS_MAX = 1 << 16
_MARKS_MAX = 1 << 12
_SIZE = 0xF0
"""Of the flags of an access: log2 of its bytes, plus 1."""
_PAE, _PCIDE = 1 << 5, 1 << 17
"""Of CR4."""
_LARGE = np.uint64(0x81)
"""Of an entry: P and PS."""


class Survey:
    """What is known of a recording when all of its pieces have been seen, one after the other."""

    def __init__(self, cr4: int = 0, vcpus: int = 1) -> None:
        self.marks: list[tuple[int, int]] = []  # (record, number), the first of them
        self._vcpus = vcpus
        self._cr4 = cr4  # bits that were ever set
        self._flags = 0  # bits of any access
        self._kinds = np.zeros(256, dtype=np.int64)
        self._large: set[int] = set()  # levels of large leaves
        self.first_user: int | None = None
        self.first_cr3: int | None = None
        self.operations = 0
        self._flagged = np.zeros(0, dtype=np.int64)  # user accesses whose next ones are not all known
        self._moved = np.zeros(0, dtype=np.bool_)
        self._offsets: dict[int, int] = {}

    def add(self, first: int, piece: Mapping[str, NDArray[Any]]) -> None:
        """piece: the columns of records from number `first` on."""
        self.operations = first + len(piece["kind"])
        self._look(first, piece)
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

    def _look(self, first: int, piece: Mapping[str, NDArray[Any]]) -> None:
        """What kinds of things are there."""
        kind, flags = piece["kind"], piece["flags"]
        self._kinds += np.bincount(kind, minlength=256)
        self._flags |= int(np.bitwise_or.reduce(flags[kind == ACCESS], initial=0))
        for value in piece["value"][kind == LOAD_CR].tolist():
            self._cr4 |= value
        for record in np.flatnonzero(kind == MARK)[: _MARKS_MAX - len(self.marks)].tolist():
            self.marks.append((first + record, int(piece["addr"][record])))
        upper = np.flatnonzero((kind == STORE) & (flags & 7 != 1) & (flags & 7 < 4))
        values, levels = piece["value"][upper], flags[upper] & 7
        large = values & _LARGE == _LARGE
        if not self._cr4 & _PAE:  # entries of four bytes
            large |= values >> np.uint64(32) & _LARGE == _LARGE
        self._large.update(np.unique(levels[large]).tolist())

    @property
    def holdings(self) -> dict[str, Any]:
        """See `holdings.told`."""
        sizes = {2: "2 MiB" if self._cr4 & _PAE else "4 MiB", 3: "1 GiB"}
        return {
            "fetches": bool(self._flags & FETCH),
            "sizes": bool(self._flags & _SIZE),
            "cpl": bool(self._flags & CPL_KNOWN),
            "efer": bool(self._kinds[LOAD_EFER]),
            "pcids": bool(self._cr4 & _PCIDE),
            "invpcid": bool(self._kinds[INVPCID]),
            "large_pages": [sizes[level] for level in sorted(self._large)],
            "vcpus": self._vcpus,
            "marks": int(self._kinds[MARK]),
        }

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
