"""The table of functions for C and C++ (shadowcore.h)."""

from .table import _C_API, get_include

__all__ = ["_C_API", "get_include"]
