"""A study as one HTML file: tables, pictures, settings, and all of it as JSON. Nothing is fetched from anywhere.

The public name of `shadowcore.report.page`.
"""

from .report.page import (
    LARGEST,
    heat,
    of_workload,
    write,
)

__all__ = [
    "LARGEST",
    "heat",
    "of_workload",
    "write",
]
