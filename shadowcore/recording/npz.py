"""The arrays of .npz files, each of them read whole and by its name."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from .. import npy
from ..errors import TraceError
from ..files import check_path


def read_arrays(
    path: str | os.PathLike[str], names: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, NDArray[Any]]:
    """The named members of an .npz file, and those of `optional` that are there; TraceError unless each can be read."""
    path = check_path(path)
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise TraceError(
                    path, None, "a recording (.screc) or an .npz file expected: this is neither, or it is cut short"
                )
            with zipfile.ZipFile(file) as archive:
                npy.check_members(archive)
                there = set(archive.namelist())
                wanted = [*names, *(name for name in optional if f"{name}.npy" in there)]
                return {name: _member(path, archive, name) for name in wanted}
    except TraceError:
        raise
    except npy.UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(path, None, f"it cannot be read: {reason}") from None


def _member(path: str, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    if f"{name}.npy" not in archive.namelist():
        raise TraceError(path, None, f"array {name!r} expected, there is none")
    try:
        return npy.parse(archive.read(f"{name}.npy"))
    except npy.UNREADABLE as error:
        raise TraceError(path, None, f"array {name!r} cannot be read: {error}") from None
