"""Recordings of running guests: what they hold, and reading them with every record checked.

A recording is an .npz file of what one processor did, in order. Its arrays have one element per record:

    kind (u1)    addr (u8)        value (u8)        flags (u2)
    1 LOAD_CR3   the new CR3
    2 LOAD_CR    CR0              CR4               one of the two has changed
    3 STORE      gpa of a store   the aligned       bits 0-2: level of the table; bits 4-6: bytes stored, 0
                 to a table       entry after it    for eight; bit 7: see Recording.snapshot
    4 TABLE      gpa of a frame                     bits 0-3: level. It begins to serve as a table: words that
                                                    are not 0 follow as STOREs, all others are 0
    5 INVLPG     linear address
    6 ACCESS     linear address   gpa reached       bit 0: write; bit 1: user, see Recording.user
    7 TABLE_END  gpa of a frame                     bits 0-3: level. It ceases to serve as a table

and insns (u4): instructions executed since the record before. Accesses are those that missed a filter. Frames
that never serve as tables have no contents. Four scalars: cr0, cr4 and efer at the start, and nframes, guest
RAM in frames of 4096 bytes.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import check_int
from .errors import TraceError

BUNDLED = "linux-fork"
"""The recording that ships with the package: Debian's 6.1 kernel, boot and 60 shell pipelines."""

LOAD_CR3, LOAD_CR, STORE, TABLE, INVLPG, ACCESS, TABLE_END = range(1, 8)
"""Kinds of records."""
SNAPSHOT = 1 << 7
"""Flag of a STORE to a frame that does not serve as a table at that moment: see Recording.snapshot."""
WRITE, USER = 1, 2
"""Flags of an ACCESS."""

_ARRAYS = {"kind": "u1", "flags": "<u2", "insns": "<u4", "addr": "<u8", "value": "<u8"}
_SCALARS = {"cr0": (1 << 64) - 1, "cr4": (1 << 64) - 1, "efer": (1 << 64) - 1, "nframes": 1 << 40}
_UNREADABLE = (
    ValueError,  # no array, cut short, or an array of objects
    OSError,
    EOFError,
    KeyError,
    RuntimeError,  # encrypted, compressed by a method that zipfile lacks
    MemoryError,
    OverflowError,
    struct.error,
    tokenize.TokenError,  # from numpy's reading of an array's header
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """What a guest did: arrays of one length, read-only, one element a record. TraceError if they cannot be.

    kind: u1, 1 to 7 (LOAD_CR3 ... TABLE_END). flags: u2, by kind.
    insns: u4, instructions since the record before.
    addr, value: u8: linear addresses, gpas and values, by kind.
    cr0, cr4, efer: registers at the start. nframes: guest RAM in frames of 4096 bytes.
    name: what reports call it.
    """

    name: str
    kind: NDArray[np.uint8]
    flags: NDArray[np.uint16]
    insns: NDArray[np.uint32]
    addr: NDArray[np.uint64]
    value: NDArray[np.uint64]
    cr0: int
    cr4: int
    efer: int
    nframes: int

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            array = np.asarray(getattr(self, name))
            if array.dtype != np.dtype(dtype) or array.ndim != 1:
                expected = f"array {name!r}: one dimension of {np.dtype(dtype)} expected"
                raise TraceError(self.name, None, f"{expected}, not {array.ndim} of {array.dtype}")
            if len(array) != len(self.kind):
                expected = f"array {name!r}: {len(self.kind)} records expected, as in 'kind'"
                raise TraceError(self.name, None, f"{expected}, not {len(array)}")
            array = np.ascontiguousarray(array).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        for name, highest in _SCALARS.items():
            scalar = np.asarray(getattr(self, name))
            lowest = 1 if name == "nframes" else 0
            if scalar.ndim or scalar.dtype.kind not in "iu" or not lowest <= int(scalar) <= highest:
                expected = f"{name!r}: one integer from {lowest} to {highest:#x} expected"
                raise TraceError(self.name, None, f"{expected}, not {scalar.dtype} of shape {scalar.shape}")
            object.__setattr__(self, name, int(scalar))
        if not self.operations:
            raise TraceError(self.name, None, "at least one record expected")
        self._check_records()

    def _check_records(self) -> None:
        """TraceError for the first record that breaks a rule of the format (rules are taken one by one)."""
        kind, flags, addr, snapshot = self.kind, self.flags, self.addr, self.snapshot
        size = np.uint64(self.memory_size)
        store, frame = kind == STORE, (kind == TABLE) | (kind == TABLE_END)
        length = (flags >> 4 & 7).astype(np.uint64)
        length[(length == 0) | snapshot] = 8
        level = np.where(store, flags & 7, flags & 15)
        rules = [
            ((kind < LOAD_CR3) | (kind > TABLE_END), "kind", "a kind from 1 to 7"),
            (
                (store | frame) & ((level < 1) | (level > 5)),
                "flags",
                "a table level from 1 to 5 in the flags",
            ),
            (store & ~np.isin(length, (1, 2, 4, 8)), "flags", "a store of 1, 2, 4 or 8 bytes in the flags"),
            (
                snapshot & (addr % np.uint64(8) != 0),
                "addr",
                "a multiple of 8 as the gpa of a snapshot's word",
            ),
            (
                store & (addr % np.uint64(8) + length > np.uint64(8)),
                "addr",
                "a store within one aligned entry of 8 bytes",
            ),
            (frame & (addr % np.uint64(4096) != 0), "addr", "a multiple of 4096 as the gpa of a table"),
            ((store | frame) & (addr >= size), "addr", f"a gpa below the end of memory, {int(size):#x}"),
        ]
        for broken, field, expected in rules:
            record = _first(broken)
            if record is not None:
                value = int(getattr(self, field)[record])
                raise TraceError(self.name, record, f"{expected} expected, not {field} {value:#x}")

    @property
    def operations(self) -> int:
        """Number of records."""
        return len(self.kind)

    @property
    def memory_size(self) -> int:
        """Guest RAM in bytes."""
        return self.nframes << 12

    @cached_property
    def instructions(self) -> int:
        """Guest instructions that the recording spans."""
        return int(self.insns.sum(dtype=np.uint64))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Records by what they are."""
        by_kind = np.bincount(self.kind, minlength=TABLE_END + 1).tolist()
        words = int(self.snapshot.sum())
        return {
            "cr3_loads": by_kind[LOAD_CR3],
            "cr0_cr4_loads": by_kind[LOAD_CR],
            "table_stores": by_kind[STORE] - words,
            "snapshot_words": words,
            "tables": by_kind[TABLE],
            "invlpg": by_kind[INVLPG],
            "accesses": by_kind[ACCESS],
            "tables_ended": by_kind[TABLE_END],
        }

    @cached_property
    def snapshot(self) -> NDArray[np.bool_]:
        """For each record, whether it is a word of a table as it stood when it began to serve.

        Such words follow the TABLE record of their frame. The other stores with the flag SNAPSHOT are made by
        the guest, to a frame that has ceased to serve: it clears tables late, often byte by byte.
        """
        flagged = (self.kind == STORE) & (self.flags & SNAPSHOT != 0)
        frame = self.addr >> np.uint64(12)
        same = np.zeros(self.operations, dtype=np.bool_)
        same[1:] = frame[1:] == frame[:-1]
        begins = np.flatnonzero(~(flagged & same))  # each record that does not go on with the one before it
        tables = begins[self.kind[begins] == TABLE]
        ends = np.append(begins, self.operations)[np.searchsorted(begins, tables) + 1]
        mask = np.zeros(self.operations + 1, dtype=np.int8)
        mask[tables + 1] += 1
        mask[ends] -= 1
        return np.cumsum(mask[:-1], dtype=np.int8).astype(np.bool_)

    @cached_property
    def first_user(self) -> int | None:
        """Number of the first user-mode access: before it the guest boots, from it on there is a workload.

        The user flag follows the half of the address space that the instruction lies in, so that boot code at
        low addresses carries it as well. There, linear addresses are physical ones, which tells it apart:
        user code begins where most of the next 16 flagged accesses reach another address.
        """
        flagged = np.flatnonzero((self.kind == ACCESS) & (self.flags & USER != 0))
        moved = self.addr[flagged] != self.value[flagged]
        before = np.append(0, np.cumsum(moved))
        ends = np.minimum(np.arange(len(flagged)) + 16, len(flagged))
        most = 2 * (before[ends] - before[:-1]) > ends - np.arange(len(flagged))
        first = _first(moved & most)
        return None if first is None else int(flagged[first])

    @cached_property
    def user(self) -> NDArray[np.bool_]:
        """For each record, whether it is a user-mode access.

        Boot code is not (see first_user). Nor is an access to the upper half of the address space: where a
        user instruction is interrupted, the processor reads tables and pushes a frame as supervisor.
        """
        mask: NDArray[np.bool_] = (self.kind == ACCESS) & (self.flags & USER != 0)
        mask &= self.addr >> np.uint64(63) == 0
        mask[: self.operations if self.first_user is None else self.first_user] = False
        return mask

    @cached_property
    def direct_map(self) -> int:
        """Linear address at which the guest maps all of its memory.

        Where the access that carried a table store was recorded as well, just before it, its addresses tell;
        without any, it is where 64-bit Linux has it unless it is moved at random.
        """
        carried = (self.kind[:-1] == ACCESS) & (self.flags[:-1] & WRITE != 0) & (self.kind[1:] == STORE)
        carried &= self.value[:-1] >> np.uint64(3) == self.addr[1:] >> np.uint64(3)
        offsets, counts = np.unique((self.addr - self.value)[:-1][carried], return_counts=True)
        return int(offsets[counts.argmax()]) if len(offsets) else 0xFFFF_8880_0000_0000

    @cached_property
    def first_cr3(self) -> int:
        """Number of the first CR3 load, 0 without one: the records before it are tables that it needs."""
        return _first(self.kind == LOAD_CR3) or 0

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The five arrays by name."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def head(self, records: int) -> Recording:
        """The recording cut after so many records."""
        check_int("records", records, 1, self.operations)
        cut: dict[str, Any] = {name: array[:records] for name, array in self.arrays.items()}
        return dataclasses.replace(self, **cut)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file that `load` reads."""
        scalars = {name: np.uint64(getattr(self, name)) for name in _SCALARS}
        np.savez_compressed(path, **self.arrays, **scalars)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Recording({self.name!r}, {self.operations} records, {self.instructions} instructions)"


def load(path: str | os.PathLike[str] | None = None) -> Recording:
    """Read a recording (None: the one that ships with the package) and check every record.

    TraceError says what is wrong: the file, the number of the record if it is one, and what was expected.
    """
    if path is None:
        bundled = importlib.resources.files(__package__) / "data" / f"{BUNDLED}.npz"
        with importlib.resources.as_file(bundled) as file:
            return load(file)
    members: dict[str, Any] = read_arrays(path, (*_ARRAYS, *_SCALARS))
    try:
        return Recording(name=Path(path).stem, **members)
    except TraceError as error:
        raise TraceError(path, error.record, error.expected) from None


def read_arrays(path: str | os.PathLike[str], names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The named members of an .npz file; TraceError unless each is there and can be read."""
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise TraceError(path, None, "an .npz file expected: this is none, or it is cut short")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {name: _member(path, archive, name) for name in names}
    except TraceError:
        raise
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(path, None, f"a readable .npz file expected: {reason}") from None


def _member(path: str | os.PathLike[str], archive: Any, name: str) -> NDArray[Any]:
    if name not in archive.files:
        raise TraceError(path, None, f"array {name!r} expected, there is none")
    try:
        member = archive[name]
    except _UNREADABLE as error:
        raise TraceError(path, None, f"array {name!r} cannot be read: {error}") from None
    if not isinstance(member, np.ndarray):
        raise TraceError(path, None, f"array {name!r} expected, the member is no array")
    return member


def _first(mask: NDArray[np.bool_]) -> int | None:
    index = int(mask.argmax()) if len(mask) else 0
    return index if len(mask) and mask[index] else None
