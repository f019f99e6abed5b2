"""A zip archive that is written member by member, and can be made what it was after any of them."""

from __future__ import annotations

import zipfile
import zlib

from ..files import Replacement

__all__ = ["Archive", "Mark"]


Mark = tuple[int, int]
"""Of an archive at some moment: bytes in the file, and members."""


class Archive:
    """Writes a zip archive into a file: members, then the table of contents, which `close` appends.

    zipfile can neither forget members, which keeps what is good where the disk is full, nor leave an archive without a
    table of contents. So this class, and nothing else here, uses four attributes of zipfile.ZipFile that Python does
    not document: `start_dir`, where the next member or the table of contents goes; `filelist` and `NameToInfo`, the
    members; `fp`, the file, None once the archive is closed. tests/recordings/test_archive.py looks after them.
    """

    def __init__(self, file: Replacement) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)

    @property
    def closed(self) -> bool:
        """Nothing can be added, and nothing forgotten."""
        return self._zip.fp is None

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of each member's contents, by its name."""
        return {info.filename: info.CRC for info in self._zip.filelist}

    def add(self, name: str, data: bytes) -> None:
        """Append a member, stored or deflated. OSError leaves an archive that nothing but `forget` or `drop` is for."""
        # A sample of the middle tells whether deflating gains anything, and whether trying harder does: what shrinks
        # little takes long, up to ten times as long, for being smaller by a tenth.
        middle = data[len(data) // 2 :][: 1 << 14]
        ratio = len(zlib.compress(middle, 1)) / max(len(middle), 1)
        method = zipfile.ZIP_DEFLATED if ratio < 0.9 else zipfile.ZIP_STORED
        # A date of its own would make two archives of the same members differ.
        info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        self._zip.writestr(info, data, method, 6 if ratio < 0.2 else 4 if ratio < 0.6 else 1)

    def mark(self) -> Mark:
        """What `forget` goes back to."""
        return self._zip.start_dir, len(self._zip.filelist)

    def forget(self, mark: Mark) -> None:
        """The members after `mark` are no more, in the file neither. OSError where it cannot be cut."""
        size, members = mark
        del self._zip.filelist[members:]
        self._zip.NameToInfo = {info.filename: info for info in self._zip.filelist}
        self._zip.start_dir = size
        self._file.truncate(size)
        self._file.seek(size)

    def check_room(self) -> None:
        """OSError unless the table of contents finds room: an archive can be closed but once."""
        end = self._file.seek(0, 2)
        self._file.write(bytes(sum(len(info.filename) + 100 for info in self._zip.filelist) + 200))
        self._file.truncate(end)
        self._file.seek(end)

    def close(self) -> None:
        """Write the table of contents. The file stays open."""
        self._zip.close()

    def drop(self) -> None:
        """Write nothing any more, a table of contents neither."""
        self._zip.fp = None
