"""The log of exits as Python sees it: rows, and files of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import columns, notebook
from .counters import EXIT_REASONS, PF_REASONS
from .mmu import EXIT_CHANGES, EXIT_DTYPE

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from .mmu import Mmu

__all__ = ["EXIT_CHANGES", "EXIT_DTYPE", "EXIT_REASONS", "ExitLog", "exit_columns", "write_exits"]

NOWHERE = np.uint64(0xFFFFFFFFFFFFFFFF)
"""The gfn of an exit that leads to none."""
_SHOWN = 20


class ExitLog:
    """The exits of a VM, one row each, in their order: what `VM.record_exits` gives.

    As a context manager it is closed when the block ends. What it has can be read before and after that.

    rows: a structured array. operation: number of the operation under way; vcpu; reason: an index into
        `shadowcore.engine.counters.EXIT_REASONS`; gva: the linear address, or the value of the register that is loaded;
        gfn: the guest frame that the access leads to, all ones if to none; error_code: of a page fault, the guest's own
        where that is injected, else the processor's (nested: bits 32 and 33 as of EXITINFO1, APM volume 2, 15.25.6).
        What the MMU did about it: shadow pages made, found again, zapped, of these flooded and recycled, synced; and
        shadow entries installed and removed, as they became present or ceased to be.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> tables.activate(vm.vcpus[0])
    >>> with vm.record_exits() as log:
    ...     vm.vcpus[0].write(0x401000, 7)
    >>> log.reasons()
    ['fill']
    >>> hex(log.rows["gva"][0]), log.rows[["made", "installed"]][0].item()
    ('0x401000', (3, 4))
    """

    def __init__(self, mmu: Mmu, size: int | None = None, first: int = 0) -> None:
        self._mmu: Mmu | None = mmu
        self._rows = np.zeros(0, EXIT_DTYPE)
        mmu.record_exits(size, first)

    @property
    def closed(self) -> bool:
        """Nothing more is logged."""
        return self._mmu is None

    @property
    def rows(self) -> NDArray[np.void]:
        """All exits so far. EngineError if there were more, since the last look, than there was room for."""
        if self._mmu is not None:
            more = self._mmu.exits()
            self._rows = np.concatenate((self._rows, more)) if len(self._rows) else more
        return self._rows

    def clear(self) -> None:
        """Drop all rows so far."""
        if self._mmu is not None:
            self._mmu.exits()
        self._rows = np.zeros(0, EXIT_DTYPE)

    def close(self) -> NDArray[np.void]:
        """Log no more, and `rows`."""
        try:
            return self.rows
        finally:
            mmu, self._mmu = self._mmu, None
            if mmu is not None:
                mmu.record_exits(0)

    def reasons(self) -> list[str]:
        """The reason of each row, by its name."""
        return [EXIT_REASONS[reason] for reason in self.rows["reason"].tolist()]

    def write(self, path: str | os.PathLike[str]) -> None:
        """The rows as a file, CSV or Parquet by its name. ConfigError, also where pyarrow is missing; OSError."""
        columns.write(path, exit_columns(self.rows))

    def to_pandas(self) -> Any:
        """The rows as a DataFrame. ConfigError where pandas is not installed."""
        pandas = notebook.pandas()
        found = exit_columns(self.rows)
        for name in ("gfn", "error_code"):
            found[name] = pandas.array(found[name].tolist(), dtype="UInt64")
        return pandas.DataFrame(found)

    def __getstate__(self) -> dict[str, Any]:
        return {"_mmu": None, "_rows": self.rows}  # a copy goes on with no machine

    def __len__(self) -> int:
        return len(self.rows)

    def __enter__(self) -> ExitLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        shown = {name: column.tolist() for name, column in exit_columns(self.rows[:_SHOWN]).items()}
        for name in ("gva", "gfn", "error_code"):
            shown[name] = ["" if value is None else f"{value:#x}" for value in shown[name]]
        more = len(self._rows) - _SHOWN
        title = f"{len(self._rows):,} exits" + (f"; {more:,} more rows" if more > 0 else "")
        return notebook.table(title, list(shown), zip(*shown.values(), strict=True))

    def __repr__(self) -> str:
        return f"ExitLog({len(self.rows):,} exits{'' if self.closed else ', open'})"


def exit_columns(rows: NDArray[np.void]) -> dict[str, Any]:
    """The columns of rows as arrays: the reason by its name; masked where there is no gfn, or no error code."""
    names = np.array(EXIT_REASONS)
    found: dict[str, Any] = {name: rows[name] for name in ("operation", "vcpu")}
    found |= {"reason": names[rows["reason"]], "gva": rows["gva"]}
    found["gfn"] = np.ma.MaskedArray(rows["gfn"], rows["gfn"] == NOWHERE)
    found["error_code"] = np.ma.MaskedArray(rows["error_code"], rows["reason"] >= len(PF_REASONS))
    return found | {name: rows[name] for name in EXIT_CHANGES}


def write_exits(path: str | os.PathLike[str], logs: Mapping[str, NDArray[np.void]]) -> None:
    """Rows of several designs, by their names, as one file with a column `design`. As ExitLog.write."""
    design = np.repeat(np.array(list(logs), dtype=np.str_), [len(rows) for rows in logs.values()])
    columns.write(path, {"design": design} | exit_columns(np.concatenate([np.zeros(0, EXIT_DTYPE), *logs.values()])))
