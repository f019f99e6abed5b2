"""Files that commands write: checked before the work is done, not after it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def writable(file: str) -> None:
    """ConfigError if a file of this name cannot be written, as far as can be told."""
    path = Path(file)
    if path.is_dir():
        raise ConfigError(f"{file}: it cannot be written: it is a directory")
    if not path.parent.is_dir():
        raise ConfigError(f"{file}: it cannot be written: there is no directory {path.parent}")


def to_file(file: str, write: Callable[[str], Any]) -> None:
    """Write it; ConfigError where that fails."""
    try:
        write(file)
    except OSError as error:
        raise ConfigError(f"{file}: it cannot be written: {error.strerror or error}") from None


def writer(option: str, module: str) -> Callable[[Any, str], Any]:
    """`write` of a module of reports that may need packages of its own."""
    try:
        found = importlib.import_module(f"..report.{module}", __package__)
    except ImportError as error:
        name = error.name or module
        raise ConfigError(f"{option}: it needs the package {name!r}: pip install {name}") from None
    check = getattr(found, "check", None)
    if check is not None:
        check()
    write: Callable[[Any, str], Any] = found.write
    return write
