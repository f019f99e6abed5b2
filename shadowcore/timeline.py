"""A study as a timeline: the trace-event JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.

The public name of `shadowcore.report.timeline`.
"""

from .report.timeline import *  # noqa: F403
from .report.timeline import __all__ as __all__
