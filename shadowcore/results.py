"""What a batch of operations came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .events import Stats


@dataclass(frozen=True)
class RunResult:
    """One row per operation, in arrays of equal length.

    outcome: uint8: 0 done, 1 guest #PF, 2 #GP, 3 MMIO (nothing was transferred). error_code: uint16, of a #PF.
    gpa: uint64: where the access led; all ones if nowhere. value: uint64: what a load or fetch read.
    exits: uint16: page-fault exits it took. emulated: uint8: stores that the emulator did.
    value_high: uint64, upper half of 16-byte values; None when no operation has that size.
    stats: the difference that the run made to the VM's counters.
    """

    outcome: NDArray[np.uint8]
    error_code: NDArray[np.uint16]
    gpa: NDArray[np.uint64]
    value: NDArray[np.uint64]
    exits: NDArray[np.uint16]
    emulated: NDArray[np.uint8]
    stats: Stats
    value_high: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.outcome)

    def __repr__(self) -> str:
        faults = int(np.count_nonzero(self.outcome == 1))
        return (
            f"RunResult({len(self)} operations, {int(self.exits.sum())} page-fault exits, "
            f"{int(self.emulated.sum())} emulated stores, {faults} guest faults)"
        )
