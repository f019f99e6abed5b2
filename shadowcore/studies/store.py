"""A folder of results: the sweep that it is of, and a file for each run that is done.

    sweep.json         the points, their labels and runs; the prices. Written before anything runs.
    ab/abcd....json    what the run of that key came to: counters, or the error that it ended by
    slurm/             what submitit writes, if it runs them
    *.lock             held while a process works on the sweep, or on its share of it

A result names the key that it is of, and ends with a digest of itself. One that was cut short is told by that, and
taken for not there; one of another version of the engine has another key. Files are put in place whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ConfigError, ShadowcoreError
from ..files import SUFFIX, check_path, lock, place, replace
from .plan import RESULTS, Plan

MANIFEST = "sweep.json"
LOGS = "slurm"
"""A folder for what an executor writes."""
_KEY = re.compile(r"[0-9a-f]{32}")


class StoreError(ShadowcoreError):
    """A result cannot be kept: the file, and why. Nothing that was kept before is lost by it.

    >>> issubclass(sc.StoreError, sc.ShadowcoreError)
    True
    """


class Damaged(ValueError):
    """A file that is no whole result."""


def packed(result: Mapping[str, Any]) -> bytes:
    """A result as its file: one line of JSON, the last field of which is the digest of what is before it."""
    text = json.dumps(result, separators=(",", ":"))[:-1].encode()
    return text + b',"digest":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def unpacked(data: bytes) -> dict[str, Any]:
    """The reverse. Damaged."""
    text, mark, rest = data.rpartition(b',"digest":"')
    if not mark or rest != hashlib.sha256(text).hexdigest().encode() + b'"}\n':
        raise Damaged("cut short, or changed")
    found: dict[str, Any] = json.loads(text + b"}")
    return found


class Store:
    """Results in a folder. OSError where it cannot be read or written, ConfigError where it is another sweep's."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(check_path(folder, "store"))

    def path(self, key: str) -> Path:
        """Where the result of a run is."""
        return self.folder / key[:2] / f"{key}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """The result of a run; None if there is none. Damaged: it is cut short or changed, or another's."""
        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        found = unpacked(data)
        if found.get("run") != key:
            raise Damaged("of another run")
        return found

    def get(self, key: str) -> dict[str, Any] | None:
        """The same, None for a damaged one as well."""
        try:
            return self.read(key)
        except Damaged:
            return None

    def put(self, result: Mapping[str, Any]) -> None:
        """Keep the result of a run, which is named in it. StoreError."""
        path = self.path(result["run"])
        try:
            path.parent.mkdir(exist_ok=True)
            place(path, packed(result))
        except OSError as error:
            raise StoreError(f"{path}: it cannot be written: {error.strerror or error}") from None

    def keys(self) -> set[str]:
        """Runs of which there is a file, whole or not."""
        return set(self._files())

    def _files(self) -> Iterator[str]:
        try:
            folders = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return
        for name in folders:
            if len(name) == 2 and (self.folder / name).is_dir():
                for entry in os.listdir(self.folder / name):
                    if entry.endswith(".json") and _KEY.fullmatch(entry[:-5]):
                        yield entry[:-5]

    # ------------------------------------------------------------------------------------------------ whose it is

    def manifest(self) -> dict[str, Any] | None:
        """What the folder is of, or None. ConfigError if it cannot be told."""
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise ConfigError(f"{self.folder}: it is no directory") from None
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"points", "costs", "axes", "results"} <= found.keys():
            raise ConfigError(f"{path}: it does not say what sweep this is")
        return found

    def begin(self, plan: Plan, *, resume: bool, shard: tuple[int, int] | None) -> io.FileIO:
        """Take the folder for a sweep, or go on with it. ConfigError, with nothing changed, if it is another's.

        A sweep that is asked for more points than before, and all of those, goes on as well. The returned file is held
        open while somebody works on it.
        """
        new = manifest(plan)
        there = self.manifest()
        if there is None and self.folder.is_dir() and any(_foreign(self.folder)):
            raise ConfigError(f"{self.folder}: there are other files in it; an empty folder is needed, or a new one")
        if there is not None and there != new:
            if there["results"] != RESULTS:
                raise ConfigError(
                    f"{self.folder}: its results are of version {there['results']!r:.20}, these would be of {RESULTS}; "
                    "another folder is needed"
                )
            others = len({_identity(point) for point in there["points"]} - {_identity(p) for p in new["points"]})
            if others:
                raise ConfigError(
                    f"{self.folder}: it is another sweep's: {others:,} of its {len(there['points']):,} points are not "
                    "in this one; another folder is needed"
                )
        keys = self.keys() & {point["run"] for point in new["points"]} if there is not None else set()
        if there is not None and not resume and (shard is None or there != new):
            raise ConfigError(
                f"{self.folder}: it holds a sweep, with {len(keys):,} runs done; --resume goes on with it, or another "
                "folder is needed"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "sweep" if shard is None else f"shard-{shard[0]}-of-{shard[1]}"
        held = lock(self.folder / f"{name}.lock")
        if held is None:
            of = "" if shard is None else f" on shard {shard[0]}/{shard[1]}"
            raise ConfigError(f"{self.folder}: another process is at work on it{of}")
        try:
            if there != new:
                replace(self.folder / MANIFEST, json.dumps(new, separators=(",", ":")).encode())
        except BaseException:
            held.close()
            raise
        return held


def manifest(plan: Plan) -> dict[str, Any]:
    """A plan in plain types: what is needed to make rows of results."""
    points = [
        {"labels": {k: _plain(v) for k, v in p.labels.items()}, "run": p.run, "native": p.native, "costs": p.costs}
        for p in plan.points
    ]
    costs = {name: each.as_dict() for name, each in plan.costs.items()}
    made = {"shadowcore": __version__, "results": RESULTS, "name": plan.name, "axes": list(plan.axes)}
    loaded: dict[str, Any] = json.loads(json.dumps(made | {"costs": costs, "points": points}))
    return loaded


def _identity(point: Mapping[str, Any]) -> str:
    return json.dumps([point["labels"], point["run"]], sort_keys=True)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _foreign(folder: Path) -> Iterator[str]:
    """What in a folder without a manifest was not left there by a sweep that never began."""
    for name in os.listdir(folder):
        if not (name.endswith((".lock", SUFFIX)) or name.startswith(".") or name == LOGS):
            yield name
