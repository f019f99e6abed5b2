"""Counters over time: how much each of them grew in windows of a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .counters import COUNTERS, EXIT_REASONS, GAUGES, Stats

NAMES = tuple(f"exits_{reason}" for reason in EXIT_REASONS) + COUNTERS
"""Of the elements of Stats.as_array."""


def grown(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """What counters of VM.stats grew by; gauges as they are afterwards. What is not in `before` was 0."""
    return {name: after[name] - (0 if name in GAUGES else before.get(name, 0)) for name in after}


class WindowLog:
    """Counts by windows, from the state of `stats` on.

    `arrays()` gives uint64 arrays with one element a window: what each counter of VM.stats grew by (a gauge: what it
    was at the end), `exits_total`,
    what `count` was told of; `pages_mean` (rounded) and `pages_max`, shadow pages in use; and `operation`, the number
    of operations (records) that were done at its end.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._rows = [stats.as_array()]
        self._ends: list[int] = []
        self._means: list[int] = []
        self._most: list[int] = []
        self._extra: dict[str, list[int]] = {}
        self._all_samples = self._all_sum = 0
        self._clear()

    def _clear(self) -> None:
        self._samples = self._sum = self._max = 0
        self._counts: dict[str, int] = {}

    @property
    def open(self) -> bool:
        """Something was told of since the last window ended."""
        return bool(self._samples)

    @property
    def pages_mean(self) -> float:
        """Of all samples."""
        return self._all_sum / self._all_samples if self._all_samples else 0.0

    def pages(self, samples: int, total: int, most: int) -> None:
        """Shadow pages in use: how many samples, their sum, and the highest."""
        self._samples += samples
        self._sum += total
        self._max = max(self._max, most)
        self._all_samples += samples
        self._all_sum += total

    def count(self, **counts: int) -> None:
        """Add to counts of this window that are not in the stats."""
        for name, number in counts.items():
            self._counts[name] = self._counts.get(name, 0) + number

    def close(self, operation: int) -> None:
        """A window ends; this many operations were done by now."""
        self._rows.append(self._stats.as_array())
        self._ends.append(operation)
        self._means.append(round(self._sum / self._samples) if self._samples else 0)
        self._most.append(self._max)
        for name, number in self._counts.items():
            self._extra.setdefault(name, []).append(number)
        self._clear()

    def arrays(self, operation: int) -> dict[str, NDArray[np.uint64]]:
        """All windows; the last one ends at `operation` if it has not ended yet."""
        if self.open:
            self.close(operation)
        grown = np.diff(np.array(self._rows, dtype=np.uint64).reshape(-1, len(NAMES)), axis=0)
        found = {name: np.ascontiguousarray(grown[:, place]) for place, name in enumerate(NAMES)}
        for name in GAUGES:
            found[name] = np.array([row[NAMES.index(name)] for row in self._rows[1:]], dtype=np.uint64)
        found["exits_total"] = grown[:, : len(EXIT_REASONS)].sum(axis=1, dtype=np.uint64)
        for name, values in self._extra.items():
            found[name] = np.array(values, dtype=np.uint64)
        found["pages_mean"] = np.array(self._means, dtype=np.uint64)
        found["pages_max"] = np.array(self._most, dtype=np.uint64)
        found["operation"] = np.array(self._ends, dtype=np.uint64)
        return found
