"""Recordings from other tools' files: .npz recordings of guests, Valgrind's lackey, DynamoRIO's drmemtrace, Pin's
pinatrace, Dinero, ChampSim, CSV. All are streamed, and may be compressed.

An importer is a module beside this one, called as the format is, and a line in `inputs.INPUTS`. It has

matches(head): whether a file that begins with these bytes, inflated, is of this format;
read(paths, writer, progress): all that is in the files goes to the Writer. progress: a `Progress`, or None. TraceError
    says what cannot be read, and where;
LENIENT: only, and True, if lines of others may stand between the format's own: `read` then has one more argument,
    lenient, with which those are skipped, and counted in `writer.skipped`;
guest(paths): only if the files are recordings of guests: registers and frames that such a Writer is made with. Others
    are recordings of programs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ...errors import ConfigError, TraceError
from ...files import check_path
from ..format import GUEST, PROGRAM
from ..inputs import INPUTS
from ..others import stranger
from ..writer import Writer
from .champsim import CHAMPSIM_DTYPE
from .cloudsuite import CLOUDSUITE_DTYPE
from .csv import CSV_COLUMNS
from .source import STDIN, Progress, Source, opened

__all__ = [
    "CHAMPSIM_DTYPE",
    "CLOUDSUITE_DTYPE",
    "CSV_COLUMNS",
    "FORMATS",
    "convert",
    "guess",
]

IMPORTERS: dict[str, ModuleType] = {name: import_module(f".{name}", __name__) for name in INPUTS}
"""By what the command line calls the format, in the order in which they are asked whose a file is."""

FORMATS: tuple[str, ...] = tuple(INPUTS)


def guess(path: str | os.PathLike[str]) -> str:
    """The format of a file, by its contents; TraceError if it has none of those that are known. ConfigError for
    standard input, of which what is looked at would be gone: `convert` tells the format of that by itself."""
    if path == STDIN:
        raise ConfigError("path: a file is needed; what is read of standard input to tell its format would be lost")
    with Source(path, keep=True) as source:
        head = source.head()
    for name, importer in IMPORTERS.items():
        if importer.matches(head):
            return name
    known = stranger(head)
    what = "this looks like none" + (f": it is {known}" if known else "")
    raise TraceError(source.path, None, f"a file of one of the formats {', '.join(FORMATS)} expected, {what}")


def convert(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    format: str = "auto",
    *,
    name: str | None = None,
    lenient: bool = False,
    progress: Progress | None = None,
) -> Writer:
    """Files of one format into the recording `out`. Several become several processes. "-" is standard input.

    format: one of FORMATS, or "auto": by the contents of the first file.
    name: what reports call it (None: as the first file). lenient: lines of others between the format's own are skipped
    and counted. Returns the writer, closed: its records, its processes, and what was skipped.
    TraceError names file, record or line, and cause; what was read before is kept, marked as incomplete.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format: one of auto, {', '.join(FORMATS)} is needed, not {format!r}")
    if isinstance(paths, (str, bytes, os.PathLike)) or not paths:
        raise ConfigError("paths: a sequence of at least one file is needed")
    out = check_path(out, "out")
    names = [check_path(path) for path in paths]
    if names.count(STDIN) > 1:
        raise ConfigError("paths: standard input (-) is read once")
    for path in names:
        for made in (out, f"{out}.partial"):
            if os.path.exists(made) and os.path.exists(path) and os.path.samefile(path, made):
                raise ConfigError(f"out: another file than {path} is needed")
    inputs = [opened(path) for path in names]
    kind = guess(inputs[0]) if format == "auto" else format
    importer = IMPORTERS[kind]
    if lenient and not getattr(importer, "LENIENT", False):
        others = ", ".join(name for name, each in IMPORTERS.items() if getattr(each, "LENIENT", False))
        raise ConfigError(f"lenient: it is for the formats {others}; one of them is needed, not {kind}")
    title = Path(inputs[0]).name.split(".")[0] if name is None else name
    source = {"format": kind, "files": [os.fspath(path) for path in inputs]}
    guest = importer.guest(inputs) if hasattr(importer, "guest") else None
    stream = PROGRAM if guest is None else GUEST
    with kept(out), Writer(out, stream, name=title, source=source, guest=guest) as writer:
        importer.read(inputs, writer, progress, **({"lenient": True} if lenient else {}))
    return writer


@contextmanager
def kept(out: str | os.PathLike[str]) -> Iterator[None]:
    """Add to a TraceError of the input what has become of the output."""
    before = _stamp(out)
    try:
        yield
    except TraceError as error:
        if error.file == os.fspath(out) or _stamp(out) == before:
            raise
        expected = f"{error.expected}; {os.fspath(out)} has what comes before, marked as incomplete"
        raise TraceError(error.file, error.record, expected, error.unit) from None


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
