"""Columns of a block as arrays in the .npy format: each as the narrowest that holds it, or as pages and offsets."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from .. import npy
from . import pages as pages_of


def _narrow(column: NDArray[Any], highest: int) -> NDArray[Any]:
    for code in ("u1", "<u2", "<u4"):
        if highest <= np.iinfo(code).max:
            return column.astype(code)
    return column


def pack(name: str, column: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The arrays that stand for a column in a block, by the name of the member; none for nothing but zeros."""
    if not len(column):
        return {}
    lowest, highest = int(column.min()), int(column.max())
    if lowest == highest:
        return {name: _narrow(column[:1], highest)} if highest else {}
    narrow = _narrow(column, highest)
    if narrow.dtype.itemsize <= 2 or column.dtype.itemsize < 8:
        return {name: narrow}
    wide = np.ascontiguousarray(column, dtype=np.uint64)
    pages = np.empty(min(pages_of.PAGES_MAX, len(wide) // 4), dtype=np.uint64)
    index, offset = np.empty(len(wide), dtype=np.uint16), np.empty(len(wide), dtype=np.uint16)
    used = pages_of.split_pages(wide, pages, index, offset)
    if used < 0:
        return {name: narrow}
    return {
        f"{name}.pages": pages[:used].copy(),
        f"{name}.index": _narrow(index, used - 1),
        f"{name}.offset": _narrow(offset, int(offset.max())),
    }


class Packed:
    """A column as it stands in a block: a number, an array, or pages with indices and offsets. ValueError if none."""

    def __init__(self, name: str, dtype: np.dtype[Any], records: int, members: Mapping[str, NDArray[Any]]) -> None:
        self.name, self.dtype, self.records = name, dtype, records
        self.array: NDArray[Any] | None = None
        self.paged: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None
        parts = [members.get(f"{name}.{part}") for part in ("pages", "index", "offset")]
        if parts[0] is not None:
            pages, index, offset = parts
            if index is None or offset is None or dtype.itemsize < 8:
                raise ValueError(f"{name}.pages with {name}.index and {name}.offset, of 64-bit numbers, expected")
            index = np.full(records, index[0]) if len(index) == 1 else index
            offset = np.full(records, offset[0]) if len(offset) == 1 else offset
            if not len(index) == len(offset) == records or index.itemsize > 4 or offset.itemsize > 2:
                raise ValueError(f"{name}.index, {name}.offset: {records} elements expected, of 32 and 16 bits at most")
            self.paged = np.ascontiguousarray(pages, np.uint64), index, offset.astype(np.uint16, copy=False)
            return
        self.array = members.get(name, np.zeros(1, dtype))
        if len(self.array) not in (1, records):
            raise ValueError(f"{records} elements, or one, expected in {name}, not {len(self.array)}")
        if self.array.itemsize > dtype.itemsize and len(self.array) and int(self.array.max()) > np.iinfo(dtype).max:
            raise ValueError(f"{name}: numbers of {8 * dtype.itemsize} bits expected, not {int(self.array.max()):#x}")

    def fill(self, target: NDArray[Any], begin: int, end: int) -> None:
        """Records [begin, end) into an array of the column's type, which may be a field of another."""
        if self.paged is None:
            assert self.array is not None
            target[:] = self.array[0] if len(self.array) == 1 != self.records else self.array[begin:end]
            return
        pages, index, offset = self.paged
        done = pages_of.join_pages(pages, index[begin:end], offset[begin:end], target)
        if done < end - begin:
            number = int(index[begin + done])
            raise ValueError(f"record {begin + done} of the block: a page of {self.name}.pages expected, not {number}")

    def decode(self) -> NDArray[Any]:
        if self.array is not None and len(self.array) == self.records:
            return self.array.astype(self.dtype, copy=False)
        array = np.empty(self.records, self.dtype)
        self.fill(array, 0, self.records)
        return array


def to_npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    npy_format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_npy(data: bytes) -> NDArray[Any]:
    """An array of one dimension in the .npy format 1.0; ValueError otherwise."""
    array = npy.parse(data)
    if data[6:8] != b"\1\0":
        raise ValueError("version 1.0 of the .npy format expected")
    if array.ndim != 1:
        raise ValueError("one dimension of plain numbers expected")
    return array
