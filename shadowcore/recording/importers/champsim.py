"""Traces of ChampSim, one a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import TraceError
from ..format import FETCH, READ, WRITE
from ..writer import Writer
from .processes import Processes
from .source import Progress, Source, sources

NAME = "champsim"

CHAMPSIM_DTYPE = np.dtype(
    [
        ("ip", "<u8"),
        ("is_branch", "u1"),
        ("branch_taken", "u1"),
        ("destination_registers", "u1", 2),
        ("source_registers", "u1", 4),
        ("destination_memory", "<u8", 2),
        ("source_memory", "<u8", 4),
    ]
)
"""An instruction of a ChampSim trace."""


def matches(head: bytes) -> bool:
    """What lies there can be instructions, their addresses too: the format has no mark of its own."""
    rows = np.frombuffer(head[: len(head) // 64 * 64], CHAMPSIM_DTYPE)
    return len(rows) > 0 and not _odd_instructions(rows).any() and _addresses(rows)


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """Each instruction is fetched, then its operands are read, then written.

    The traces have no sizes: fetches and accesses are of one byte. An operand of address 0 is none. Traces of another
    layout, such as CloudSuite's of 96 bytes an instruction, are told by what can be no instruction.
    """
    processes = Processes(writer)
    for source in sources(paths, progress):
        with source:
            processes.run(processes.new(None, text=source.path))
            _read(source, writer)


def _read(source: Source, writer: Writer) -> None:
    position, rest = 0, b""
    while data := source.read():
        data = rest + data
        whole = len(data) // CHAMPSIM_DTYPE.itemsize
        rest = data[whole * CHAMPSIM_DTYPE.itemsize :]
        rows = np.frombuffer(data, CHAMPSIM_DTYPE, whole)
        bad = np.flatnonzero(_odd_instructions(rows))
        if len(bad):
            _write(rows[: bad[0]], writer)
            raise TraceError(
                source.path,
                position + int(bad[0]),
                "an instruction of 64 bytes expected, whose branch flags are 0 or 1 and whose address is not 0 "
                "(CloudSuite's, of 96 bytes, are not read)",
            )
        _write(rows, writer)
        position += whole
    if rest:
        expected = f"an instruction of 64 bytes expected, the trace ends after {len(rest)}"
        raise TraceError(source.path, position, expected)
    if not position:
        raise TraceError(source.path, 0, "an instruction of 64 bytes expected, the trace is empty")


_OPS = np.array([FETCH] + [READ] * 4 + [WRITE] * 2, dtype=np.uint8)


def _odd_instructions(rows: Any) -> Any:
    """For each row, whether it can be no instruction."""
    return (rows["is_branch"] > 1) | (rows["branch_taken"] > 1) | (rows["ip"] == 0)


def _addresses(rows: Any) -> bool:
    """What should be addresses may be: none is in the lowest page, where nothing is mapped, but for 0 as no operand."""
    operands = (rows[name].reshape(-1) for name in ("source_memory", "destination_memory"))
    addresses = (rows["ip"], *(each[each != 0] for each in operands))
    return all(bool((each >= 1 << 12).all()) for each in addresses)


def _write(rows: Any, writer: Writer) -> None:
    addr = np.empty((len(rows), 7), dtype=np.uint64)
    addr[:, 0], addr[:, 1:5], addr[:, 5:] = rows["ip"], rows["source_memory"], rows["destination_memory"]
    there = addr != 0
    there[:, 0] = True
    writer.write(op=np.broadcast_to(_OPS, addr.shape)[there], size=1, addr=addr[there])
