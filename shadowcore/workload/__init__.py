"""Workloads by name, run on the guest kernel: `catalog`, `first_touch` and `lmbench` have what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import catalog as catalog
from . import first_touch as first_touch
from . import lmbench as lmbench
from .runner import WorkloadResult, find, run
from .script import WORKLOADS, Guest, Parameter, Workload

if TYPE_CHECKING:
    from .rates import Row

__all__ = ["WORKLOADS", "Guest", "Parameter", "Workload", "WorkloadResult", "calibration", "find", "run"]


def calibration(recordings: tuple[str | None, ...] = (None,), spaces: int = 120, seed: int = 1) -> list[Row]:
    """Rates of recorded Linux guests beside those of the guest kernel: see rates.rows."""
    from .rates import rows

    return rows(recordings, spaces, seed)
