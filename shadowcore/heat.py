"""Where a guest is busy: accesses by frame and by address space, over time, and the exits of each.

The public name of `shadowcore.studies.heat`.
"""

from .studies.heat import *  # noqa: F403
from .studies.heat import __all__ as __all__
