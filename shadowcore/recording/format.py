"""The file format of recordings: streams, their columns, events, blocks. docs/recordings.md has all.

Three streams are recorded: what a guest's processor did ("guest", the records of shadowcore.recording.guest),
operations for `cpu.run` ("operations"), and what programs did in their own address spaces ("program"). Files of any
length are written (`writer`) and read (`reader`) in bounded memory, by blocks of records, compressed, with checksums.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

FORMAT = "shadowcore recording"
VERSION = 2
"""Of the files that are written."""
VERSIONS = (1, 2)
"""Of those that are read. 1: a guest has one processor, and kinds of records up to 7."""
SUFFIX = ".screc"
BLOCK = 1 << 18
"""Records in a block, as they are written."""
BLOCK_MAX = 1 << 20
"""Records in a block, as they are read: a limit on memory."""

INCOMPLETE = "The recording is incomplete: it ended before its time"
"""What figures of such a one are shown with."""

GUEST, OPERATIONS, PROGRAM = "guest", "operations", "program"
"""Streams."""

STREAMS: dict[str, dict[str, str]] = {
    GUEST: {"kind": "u1", "flags": "<u2", "insns": "<u4", "addr": "<u8", "value": "<u8", "vcpu": "u1"},
    OPERATIONS: {
        "op": "u1",
        "user": "u1",
        "size": "u1",
        "addr": "<u8",
        "value": "<u8",
        "vcpu": "u1",
        "value_high": "<u8",
        "expected": "<u8",
        "expected_high": "<u8",
    },
    PROGRAM: {"op": "u1", "size": "<u2", "addr": "<u8"},
}
"""Columns of each stream; those of an operation after `value` may be absent."""

MACHINE = ("cr0", "cr4", "efer", "cr3", "pkru", "cr2", "cpl", "ac")
"""Registers at the start of a stream of operations."""

CLONE_VM = 0x100
"""Of the flags of Event.CLONE: what was made shares its address space, a thread."""


class Event(IntEnum):
    """What a program asked of its kernel, or became: `kind` of an event of a program recording."""

    RUN = 1
    """From here on it is `process` whose accesses follow."""
    EXEC = 2
    """A new program in the address space of `process`, which is emptied. file: its path, where known."""
    CLONE = 3
    """A new process `other`, or with CLONE_VM in flags a thread."""
    EXIT = 4
    """The process ends, with status `other`."""
    MMAP = 5
    """[addr, addr + size) is mapped: prot and flags as the kernel takes them; file and offset unless anonymous."""
    MUNMAP = 6
    MPROTECT = 7
    BRK = 8
    """The heap ends at addr; the first of a program says where it begins."""
    MREMAP = 9
    """[other, other + offset) becomes [addr, addr + size)."""
    MADVISE = 10
    """flags: the advice (4: MADV_DONTNEED)."""


READ, WRITE, FETCH, MODIFY = range(4)
"""`op` of an access of a program; MODIFY reads and writes. The first three are those of sc.Op."""

EVENT_DTYPE = np.dtype(
    [
        ("at", "<u4"),
        ("kind", "u1"),
        ("process", "<u4"),
        ("addr", "<u8"),
        ("size", "<u8"),
        ("prot", "<u4"),
        ("flags", "<u8"),
        ("file", "<u4"),
        ("offset", "<u8"),
        ("other", "<u8"),
    ]
)
"""An event. at: number, in its block, of the access that it precedes. file: counts the files of the index from 1."""

Accesses = tuple[int, NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint64]]
"""Accesses of a process that nothing interrupts: (process, op, size, addr)."""


class Block(NamedTuple):
    """Records [first, first + records) of a recording: columns by name, and the events of a program recording."""

    first: int
    records: int
    columns: dict[str, NDArray[Any]]
    events: NDArray[np.void] | None = None

    def segments(self) -> Iterator[NDArray[np.void] | Accesses]:
        """What a program recording holds, in order: an event (an element of EVENT_DTYPE but for RUN), or accesses that
        nothing interrupts, as (process, op, size, addr)."""
        if self.events is None:
            raise ConfigError("block: one of a program recording is needed; others have no events")
        op, size, addr = (self.columns[name] for name in ("op", "size", "addr"))
        ends = np.append(self.events["at"], self.records)[1:].tolist()
        process = 0
        for event, begin, end in zip(self.events, self.events["at"].tolist(), ends, strict=True):
            if event["kind"] == Event.RUN:
                process = int(event["process"])
            else:
                yield event
            if begin < end:
                yield process, op[begin:end], size[begin:end], addr[begin:end]
