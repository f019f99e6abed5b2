"""Arrays in numpy's .npy format, out of archives that nobody vouches for: each is good, or ValueError says why not.

numpy's own reader ends at a damaged header in whatever its parser raises, which differs from version to version.
"""

from __future__ import annotations

import ast
import math
import threading
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER_MAX = 1 << 13
"""Bytes of a header, at most."""

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,  # encrypted
    NotImplementedError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a member of an archive raises."""

_MAGIC = b"\x93NUMPY"
_LENGTH = {1: 2, 2: 4, 3: 4}
"""Bytes of the length of the header, by version."""
_PARSER = threading.Lock()
"""CPython 3.11 gives SystemError where two threads are in its parser."""


def check_members(archive: zipfile.ZipFile) -> None:
    """ValueError for two members of one name, of which readers take either, and for a member that is neither stored nor
    deflated: which other methods there are, and what they raise at damaged data, differs from Python to Python."""
    names = set()
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename}: stored or deflated data expected, not method {member.compress_type}")
        if member.filename in names:
            raise ValueError(f"{member.filename}: one member of this name expected, there are several")
        names.add(member.filename)


def parse(data: bytes) -> NDArray[Any]:
    """The array that `data` holds, read-only; ValueError if it is none of plain numbers or text, or not all of it."""
    if data[:6] != _MAGIC or len(data) < 10:
        raise ValueError("an array in the .npy format expected")
    width = _LENGTH.get(data[6], 0)
    if not width or data[7]:
        raise ValueError(f"version 1.0, 2.0 or 3.0 of the .npy format expected, not {data[6]}.{data[7]}")
    begin = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if begin > min(len(data), HEADER_MAX):
        raise ValueError(f"a header of {HEADER_MAX} bytes at most, and all of it, expected")
    dtype, fortran, shape = _header(data[8 + width : begin].decode("utf-8" if data[6] == 3 else "latin-1"))
    size = math.prod(shape)
    if len(data) - begin != size * dtype.itemsize:
        raise ValueError(f"{size} elements of {dtype} expected, there are {len(data) - begin} bytes")
    flat = np.frombuffer(data, dtype, size, begin) if size else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(text: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    try:
        with _PARSER:
            header = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"a readable header expected: {type(error).__name__}") from None
    if type(header) is not dict or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("a header with descr, fortran_order and shape expected")
    shape, fortran = header["shape"], header["fortran_order"]
    if type(fortran) is not bool:
        raise ValueError(f"True or False expected as fortran_order, not {fortran!r:.40}")
    if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise ValueError(f"a tuple of lengths expected as shape, not {shape!r:.40}")
    return _dtype(header["descr"]), fortran, shape


def _dtype(descr: Any) -> np.dtype[Any]:
    """A type of numbers or text, or a structure of such; nothing nested, and no objects."""
    fields = descr if type(descr) is list else [("", descr)]
    if not fields or not all(
        type(field) is tuple and len(field) == 2 and type(field[0]) is str and type(field[1]) is str for field in fields
    ):
        raise ValueError(f"a type, or a list of names and types, expected as descr, not {descr!r:.40}")
    try:
        dtype: np.dtype[Any] = np.dtype(descr)
    except (TypeError, ValueError, SyntaxError, MemoryError, OverflowError) as error:
        raise ValueError(f"a type of numbers expected as descr: {error}") from None
    kinds = [dtype.fields[name][0].kind for name in dtype.names] if dtype.fields and dtype.names else [dtype.kind]
    if dtype.hasobject or dtype.itemsize == 0 or dtype.shape or not set(kinds) <= set("biufcSU"):
        raise ValueError(f"plain numbers or text expected, not {dtype}")
    return dtype
