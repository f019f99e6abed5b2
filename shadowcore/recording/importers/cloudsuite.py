"""Traces of ChampSim in the layout of CloudSuite, 96 bytes an instruction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..others import stranger
from ..writer import Writer
from .champsim import instructions, odd_instructions, plausible, write
from .processes import Processes
from .source import Progress, sources

CLOUDSUITE_DTYPE = np.dtype(
    {
        "names": [
            "ip",
            "is_branch",
            "branch_taken",
            "destination_registers",
            "source_registers",
            "destination_memory",
            "source_memory",
            "asid",
        ],
        "formats": ["<u8", "u1", "u1", ("u1", 4), ("u1", 4), ("<u8", 4), ("<u8", 4), "<u2"],
        "offsets": [0, 8, 9, 10, 14, 24, 56, 88],
        "itemsize": 96,
    }
)
"""An instruction of such a trace. asid: its address space."""

_PADDING = [*range(18, 24), *range(90, 96)]
"""Bytes that no field has. The tool leaves them 0, which tells this layout from others."""


def matches(head: bytes) -> bool:
    """What lies there can be instructions of 96 bytes, their addresses too."""
    rows = np.frombuffer(head[: len(head) // 96 * 96], CLOUDSUITE_DTYPE)
    return not stranger(head) and plausible(rows) and not _odd(rows).any()


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """As of ChampSim's own layout; each address space of a file is a process."""
    processes = Processes(writer)
    for source in sources(paths, progress):
        spaces: dict[int, int] = {}
        with source:
            for rows in instructions(source, CLOUDSUITE_DTYPE, _odd, "(ChampSim's own, of 64: champsim)"):
                ends = np.flatnonzero(np.diff(rows["asid"])) + 1
                for part in np.split(rows, ends) if len(rows) else ():
                    asid = int(part["asid"][0])
                    if asid not in spaces:
                        spaces[asid] = processes.new(None, text=source.path)
                    processes.run(spaces[asid])
                    write(part, writer)


def _odd(rows: Any) -> NDArray[np.bool_]:
    raw = rows.view(np.uint8).reshape(len(rows), 96) if len(rows) else np.zeros((0, 96), np.uint8)
    found: NDArray[np.bool_] = odd_instructions(rows) | raw[:, _PADDING].any(axis=1)
    return found
