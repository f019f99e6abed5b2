"""The files that recordings lie in: blocks of records, compressed, each with its checksums. docs/recordings.md has all.

The public name of `shadowcore.recording.format`.
"""

from .recording.format import (
    BLOCK,
    BLOCK_MAX,
    EVENT_DTYPE,
    FETCH,
    GUEST,
    MODIFY,
    OPERATIONS,
    PROGRAM,
    READ,
    STREAMS,
    WRITE,
    Block,
    Event,
    Reader,
    Writer,
    is_recording,
    pack,
)

__all__ = [
    "BLOCK",
    "BLOCK_MAX",
    "EVENT_DTYPE",
    "FETCH",
    "GUEST",
    "MODIFY",
    "OPERATIONS",
    "PROGRAM",
    "READ",
    "STREAMS",
    "WRITE",
    "Block",
    "Event",
    "Reader",
    "Writer",
    "is_recording",
    "pack",
]
