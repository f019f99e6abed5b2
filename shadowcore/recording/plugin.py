"""The recorder's plug-in for an emulator: where its source is, what it needs, and building it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError

SOURCE = "SHADOWCORE_RECORDER"
"""Environment variable: the folder `recorder` of the source archive, where the package lies without it."""
COMMON = ("core.c", "filter.c", "tables.c", "decode.c", "stream.c", "events.c")
HEADERS = ("emulator.h", "recorder.h")
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-fno-plt", "-fPIC", "-shared", "-fvisibility=hidden")


class BackEnd(NamedTuple):
    """What speaks one version of the emulator's plug-in interface.

    source: its file. flags: of the compiler, for all files.
    first, last: releases of QEMU that it is for, (major, minor); last None: all later ones.
    """

    source: str
    flags: tuple[str, ...]
    first: tuple[int, int]
    last: tuple[int, int] | None


BACK_ENDS = (
    BackEnd("qemu_v1.c", ("-DINTERFACE=1",), (7, 2), (7, 2)),
    BackEnd("qemu_v4.c", ("-DINTERFACE=4",), (10, 0), (10, 2)),
    BackEnd("qemu_v4.c", ("-DINTERFACE=6",), (11, 0), (11, 0)),
    BackEnd("qemu_v4.c", ("-DINTERFACE=7",), (11, 1), None),
)


class Emulator(NamedTuple):
    """A QEMU that is installed. path: of its program. version: (major, minor). text: as it says it itself."""

    path: str
    version: tuple[int, int]
    text: str


def emulator(program: str) -> Emulator:
    """The QEMU that a command names; ConfigError unless it is there and can have plug-ins."""
    path = shutil.which(program)
    if path is None:
        package = "qemu-system-x86 of Debian, Ubuntu and Fedora"
        raise ConfigError(f"qemu: {program!r} is not installed here; it is in the package {package}")
    said = _output(path, "--version")
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)[^\n]*", said)
    if found is None:
        raise ConfigError(f"qemu: {path} is no system emulator of QEMU's: qemu-system-x86_64 is needed")
    if not re.search(r"^-plugin ", _output(path, "-help"), re.M):
        raise ConfigError(f"qemu: {path} was built without plug-ins (configure --enable-plugins)")
    return Emulator(path, (int(found[1]), int(found[2])), found[0].removeprefix("QEMU emulator version "))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ConfigError(f"qemu: {command[0]} cannot be run: {error.strerror}") from None
    return done.stdout


def back_end(version: tuple[int, int]) -> BackEnd:
    """The back end for a release of QEMU; ConfigError if there is none."""
    for made in BACK_ENDS:
        if made.first <= version and (made.last is None or version <= made.last):
            return made
    raise ConfigError(f"qemu: version 7.2, or 10.0 or later, is needed, not {version[0]}.{version[1]}")


def source_folder() -> Path:
    """Where the plug-in's source is; ConfigError if nowhere."""
    given = os.environ.get(SOURCE)
    folder = Path(given) if given else Path(__file__).parents[2] / "recorder"
    needed = (*COMMON, *HEADERS, *(made.source for made in BACK_ENDS))
    with suppress(OSError):  # what cannot be the name of a folder
        if all((folder / name).is_file() for name in needed):
            return folder
    expected = (
        "the plug-in's source is no part of the installed package: the folder `recorder` of the source archive is"
    )
    raise ConfigError(f"recorder: {expected} needed, named by {SOURCE}; it is not in {folder!s:.200}")


def build(made: BackEnd) -> Path:
    """The plug-in, compiled unless it was before: in the user's cache, named by the hash of all that went into it."""
    folder = source_folder()
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise ConfigError("cc: a C compiler is needed to build the recorder's plug-in; CC names another than cc")
    sources = [folder / name for name in (*COMMON, made.source)]
    digest = hashlib.sha256("\0".join((compiler, *FLAGS, *made.flags)).encode())
    for path in (*sources, *(folder / name for name in HEADERS)):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shadowcore"
    target = cache / f"{Path(made.source).stem}-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            output = Path(scratch) / target.name
            command = [compiler, *FLAGS, *made.flags, "-o", str(output), *map(str, sources)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
                raise ConfigError(f"cc: {compiler} does not build the recorder's plug-in: {said}")
            output.replace(target)
    except OSError as error:
        raise ConfigError(f"{error.filename or cache}: no room for the recorder's plug-in: {error.strerror}") from None
    return target
