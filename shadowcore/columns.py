"""Columns of one length as a file: CSV or Parquet.

A column is a sequence, in which None is a field that is empty; or an array, in which one that is masked is.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError
from .files import Replacement, check_path, replace

Column = Sequence[Any] | np.ndarray[Any, Any]

SUFFIXES = (".csv", ".parquet")


def check(path: str | os.PathLike[str], name: str = "path") -> str:
    """The suffix, which says what the file is. ConfigError for another one, and where Parquet cannot be written."""
    suffix = Path(check_path(path, name)).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{name}: a file that ends in {' or '.join(SUFFIXES)} is needed, not {os.fspath(path)!r}")
    if suffix == ".parquet":
        pyarrow()
    return suffix


def write(path: str | os.PathLike[str], columns: Mapping[str, Column]) -> None:
    """Write them: what the file is, its name says. ConfigError, OSError."""
    if check(path) == ".csv":
        write_csv(path, columns)
    else:
        write_parquet(path, columns)


def write_csv(path: str | os.PathLike[str], columns: Mapping[str, Column]) -> None:
    """Write a header line and the rows. OSError where that cannot be done; an older file is then kept."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    plain = (column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values())
    writer.writerows(zip(*plain, strict=True))
    replace(path, file.getvalue().encode("utf-8"))


def pyarrow() -> Any:
    """The package; ConfigError where it is not installed."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ConfigError("parquet: it needs pyarrow: pip install 'shadowcore[parquet]'") from None


def write_parquet(path: str | os.PathLike[str], columns: Mapping[str, Column]) -> None:
    """The same in Parquet. ConfigError where pyarrow is not installed."""
    arrow = pyarrow()
    arrays = {}
    for name, column in columns.items():
        if isinstance(column, np.ndarray) and column.dtype.kind == "U":
            column = column.tolist()
        arrays[name] = arrow.array(column)
    table = arrow.table(arrays)
    with Replacement(path) as file:
        arrow.parquet.write_table(table, arrow.PythonFile(file, mode="w"))
