"""Where a guest is busy: accesses by frame and by address space, over time, and the exits of each.

The public name of `shadowcore.studies.heat`.
"""

from .studies.heat import (
    heat,
    of_workload,
)

__all__ = [
    "heat",
    "of_workload",
]
