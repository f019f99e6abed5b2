"""The files that recordings lie in: blocks of records, compressed, each with its checksums. docs/recordings.md has all.

The public names of `shadowcore.recording.format`, `packing`, `writer` and `reader`.
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
)
from .recording.packing import pack
from .recording.reader import Reader, is_recording
from .recording.writer import Writer

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
