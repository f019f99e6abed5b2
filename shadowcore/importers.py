"""Recordings from other tools' files: .npz recordings of guests, Valgrind's lackey, ChampSim, CSV. All are streamed.

The public name of `shadowcore.recording.importers`.
"""

from .recording.importers import *  # noqa: F403
from .recording.importers import __all__ as __all__
