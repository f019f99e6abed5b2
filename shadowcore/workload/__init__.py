"""Workloads by name, run on the guest kernel: `catalog` has what they do, docs/workloads.md tells of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .catalog import WORKLOADS
from .runner import WorkloadResult, find, run
from .script import Guest, Parameter, Workload

if TYPE_CHECKING:
    from .rates import Row

__all__ = ["WORKLOADS", "Guest", "Parameter", "Workload", "WorkloadResult", "calibration", "find", "run"]


def calibration(recordings: tuple[str | None, ...] = (None,), spaces: int = 120, seed: int = 1) -> list[Row]:
    """Rates of recorded Linux guests beside those of the guest kernel: see rates.rows."""
    from .rates import rows

    return rows(recordings, spaces, seed)
