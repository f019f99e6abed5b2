"""Replays: a recorded guest run again on a virtual machine of some design, and what that costs.

The public name of `shadowcore.recording.replay`.
"""

from .recording.replay import *  # noqa: F403
from .recording.replay import __all__ as __all__
