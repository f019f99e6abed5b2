"""Recordings from other tools' files: .npz recordings of guests, Valgrind's lackey, ChampSim, CSV. All are streamed.

The public name of `shadowcore.recording.importers`.
"""

from .recording.importers import (
    CHAMPSIM_DTYPE,
    CSV_COLUMNS,
    FORMATS,
    convert,
    guess,
)

__all__ = [
    "CHAMPSIM_DTYPE",
    "CSV_COLUMNS",
    "FORMATS",
    "convert",
    "guess",
]
