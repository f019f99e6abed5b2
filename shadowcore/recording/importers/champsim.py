"""Traces of ChampSim, one a process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import TraceError
from ..format import FETCH, READ, WRITE
from ..others import stranger
from ..writer import Writer
from .processes import Processes
from .source import Progress, Source, sources

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
    return not stranger(head) and plausible(np.frombuffer(head[: len(head) // 64 * 64], CHAMPSIM_DTYPE))


def read(paths: Sequence[str | os.PathLike[str]], writer: Writer, progress: Progress | None = None) -> None:
    """Each instruction is fetched, then its operands are read, then written.

    The traces have no sizes: fetches and accesses are of one byte. An operand of address 0 is none. Traces of another
    layout are told by what can be no instruction.
    """
    processes = Processes(writer)
    for source in sources(paths, progress):
        with source:
            processes.run(processes.new(None, text=source.path))
            for rows in instructions(source, CHAMPSIM_DTYPE, odd_instructions, "(CloudSuite's, of 96: cloudsuite)"):
                write(rows, writer)


def instructions(
    source: Source, dtype: np.dtype[Any], odd: Callable[[Any], NDArray[np.bool_]], other: str
) -> Iterator[Any]:
    """The instructions of a trace by parts. TraceError at the first that can be none, behind those before it.

    odd: for each row, whether it is none. other: what else it may be.
    """
    position, rest, size = 0, b"", dtype.itemsize
    while data := source.read():
        data = rest + data
        whole = len(data) // size
        rest = data[whole * size :]
        rows = np.frombuffer(data, dtype, whole)
        bad = np.flatnonzero(odd(rows))
        if len(bad):
            yield rows[: bad[0]]
            expected = f"an instruction of {size} bytes expected, whose branch flags are 0 or 1 and address is not 0"
            raise TraceError(source.path, position + int(bad[0]), f"{expected} {other}")
        yield rows
        position += whole
    if rest:
        expected = f"an instruction of {size} bytes expected, the trace ends after {len(rest)}"
        raise TraceError(source.path, position, expected)
    if not position:
        raise TraceError(source.path, 0, f"an instruction of {size} bytes expected, the trace is empty")


def odd_instructions(rows: Any) -> NDArray[np.bool_]:
    """For each row, whether it can be no instruction."""
    found: NDArray[np.bool_] = (rows["is_branch"] > 1) | (rows["branch_taken"] > 1) | (rows["ip"] == 0)
    return found


def plausible(rows: Any) -> bool:
    """What should be instructions may be, and no address is in the lowest page, where nothing is mapped, but for 0 as
    no operand."""
    operands = (rows[name].reshape(-1) for name in ("source_memory", "destination_memory"))
    addresses = (rows["ip"], *(each[each != 0] for each in operands))
    return len(rows) > 0 and not odd_instructions(rows).any() and all(bool((a >= 1 << 12).all()) for a in addresses)


def write(rows: Any, writer: Writer) -> None:
    """Fetches, reads and writes of instructions."""
    reads, writes = (rows[name].shape[1] for name in ("source_memory", "destination_memory"))
    ops = np.array([FETCH] + [READ] * reads + [WRITE] * writes, dtype=np.uint8)
    addr = np.empty((len(rows), len(ops)), dtype=np.uint64)
    addr[:, 0], addr[:, 1 : 1 + reads] = rows["ip"], rows["source_memory"]
    addr[:, 1 + reads :] = rows["destination_memory"]
    there = addr != 0
    there[:, 0] = True
    writer.write(op=np.broadcast_to(ops, addr.shape)[there], size=1, addr=addr[there])
