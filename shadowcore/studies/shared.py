"""Sources of studies for other processes: a workload by its name, a recording by its file or as arrays that are mapped.

Arrays that were read once are written as plain .npy files, and every process maps those: the machine holds them once,
however many processes replay them. A recording in blocks is unpacked for that once, unless it is large: then it is read
from its file piece by piece, wherever that happens.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TraceError
from ..recording.guest import Recording, RecordingFile, load
from . import source as sources
from .source import GuestSource, Source
from .store import StoreError

UNPACKED = 20_000_000
"""Records of a recording in blocks, at most, that are unpacked: 24 bytes each."""
_SCALARS = ("cr0", "cr4", "efer", "nframes", "vcpus", "complete")


@dataclasses.dataclass(frozen=True)
class Shared:
    """How another process gets a source.

    words: as the command line calls it. state: size and time of change of its files, which must stay what they are.
    arrays: the folder with its arrays, or None; name, scalars: of the recording that these are.
    """

    words: tuple[str, ...]
    state: tuple[tuple[int, int], ...] = ()
    arrays: str | None = None
    name: str = ""
    scalars: tuple[tuple[str, int], ...] = ()


_opened: dict[Shared, Source] = {}


def share(source: Source, folder: Path) -> Shared:
    """Make a source ready for other processes. folder: where its arrays may be put. StoreError."""
    recording = source.recording
    if recording is None and not source.files:
        made = Shared(source.words)
    elif recording is None or (isinstance(recording, RecordingFile) and recording.operations > UNPACKED):
        words = tuple(map(os.path.abspath, source.files))
        made = Shared(words, tuple(map(_state, words)))
    else:
        if isinstance(recording, RecordingFile):
            recording = load(recording.path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, array in recording.arrays.items():
                np.save(folder / f"{name}.npy", array)
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"{folder}: arrays of {recording.name} cannot be written: {reason}") from None
        scalars = tuple((name, int(getattr(recording, name))) for name in _SCALARS)
        made = Shared(source.words, (), str(folder.absolute()), recording.name, scalars)
        source = GuestSource(_mapped(made), source.words)
    _opened[made] = source  # a process that is forked has it at once
    return made


def forget(shared: Shared) -> None:
    """It is not asked for any more."""
    _opened.pop(shared, None)


def find(shared: Shared) -> Source:
    """The source, in whatever process; opened once. ConfigError, TraceError, OSError."""
    if shared not in _opened:
        for path, state in zip(shared.words, shared.state, strict=False):
            if _state(path) != state:
                raise TraceError(path, None, "the file that was there when the sweep began is expected")
        if shared.arrays is None:
            _opened[shared] = sources.find(list(shared.words) or None)
        else:
            _opened[shared] = GuestSource(_mapped(shared), shared.words)
    return _opened[shared]


def _state(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _mapped(shared: Shared) -> Recording:
    scalars: dict[str, Any] = dict(shared.scalars)
    scalars["complete"] = bool(scalars["complete"])
    files = sorted(Path(str(shared.arrays)).glob("*.npy"))
    arrays: dict[str, Any] = {file.stem: np.load(file, mmap_mode="r") for file in files}
    return Recording(name=shared.name, **arrays, **scalars)
