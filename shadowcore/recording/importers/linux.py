""".npz recordings of guests."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ...errors import ConfigError, TraceError
from ..guest import MEMBERS, load, registers
from ..writer import Writer
from .source import Pipe, Progress

_FIRST = re.compile(rb"PK\x03\x04.{26}(%s)\.(npy|json)" % "|".join([*MEMBERS, "recording"]).encode(), re.S)


def matches(head: bytes) -> bool:
    """A zip archive whose first member is one of a recording's. Other archives are no input."""
    return _FIRST.match(head) is not None


def guest(paths: Sequence[str | os.PathLike[str]]) -> dict[str, int]:
    """Registers and frames of the guest. ConfigError for more than one file, TraceError."""
    if len(paths) > 1:
        raise ConfigError("paths: one recording of a guest is needed, not several")
    if isinstance(paths[0], Pipe):
        raise TraceError(paths[0].path, None, "a file expected, not a pipe: an .npz is read from its end")
    return registers(paths[0])


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """Every field of every record is kept, and whether the recording is complete. The arrays are read as wholes: the
    format allows nothing else."""
    loaded = load(paths[0])
    writer.write(**loaded.arrays)
    writer.close(complete=loaded.complete)
