"""What was published of real hypervisors, predicted: `shadowcore reproduce --source NAME`, docs/validity.md."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from .predictions import FAR, SOURCES, Row, Validity
from .pvm import pvm_2023
from .shadowbox import shadowbox_2026

__all__ = ["FAR", "SOURCES", "Row", "Validity", "validity"]

MADE: dict[str, Callable[[Callable[[], None]], Validity]] = {
    "pvm-2023": pvm_2023,
    "shadowbox-2026": shadowbox_2026,
}
STEPS = {"pvm-2023": 40, "shadowbox-2026": 40}
"""Runs of workloads in each, about."""


def validity(source: str, progress: Callable[[int, int], None] | None = None) -> Validity:
    """What was published in `source` (SOURCES), predicted: some seconds. ConfigError for a name that there is not.
    progress: called with runs done, and all."""
    if source not in MADE:
        raise ConfigError(f"source: {source!r:.60} is not one of {', '.join(MADE)}")
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, STEPS[source]), STEPS[source])

    return MADE[source](step)
