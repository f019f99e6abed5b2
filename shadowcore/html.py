"""A study as one HTML file: tables, pictures, settings, and all of it as JSON. Nothing is fetched from anywhere.

The public name of `shadowcore.report.page`.
"""

from .report.page import *  # noqa: F403
from .report.page import __all__ as __all__
