"""Executors by name, for the command line: what other packages run tasks on. Python takes any, see `sweep`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..errors import ConfigError
from .settings import near, parse
from .spread import Executor
from .store import LOGS


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"executor: {name} cannot be had ({error}): pip install {extra}") from None


@contextmanager
def _dask(where: str, folder: str) -> Iterator[Executor]:
    """where: the address of a scheduler, a file that it wrote, or nothing for a cluster of this machine."""
    distributed = _import("distributed", "'shadowcore[dask]'")
    if not where:
        asked: dict[str, Any] = {"processes": True, "threads_per_worker": 1}
    else:
        asked = {"scheduler_file": where} if where.endswith(".json") else {"address": where}
    try:
        client = distributed.Client(**asked)
    except (OSError, ValueError) as error:
        raise ConfigError(f"executor: dask: {where}: {error}") from None
    with client:
        yield client


@contextmanager
def _mpi(where: str, folder: str) -> Iterator[Executor]:
    """Under `mpiexec -n N python -m mpi4py.futures`: the processes that it started."""
    if where:
        raise ConfigError(f"executor: mpi takes nothing more, not {where!r}")
    futures = _import("mpi4py.futures", "mpi4py")
    with futures.MPIPoolExecutor() as pool:
        yield pool


@contextmanager
def _slurm(where: str, folder: str) -> Iterator[Executor]:
    """where: parameters of submitit, NAME=VALUE between commas; cluster=local runs them on this machine."""
    submitit = _import("submitit", "'shadowcore[slurm]'")
    parameters = {}
    for part in filter(None, where.split(",")):
        name, equals, text = part.partition("=")
        if not equals or not text:
            raise ConfigError(f"executor: slurm: {part!r} is not NAME=VALUE")
        parameters[name.strip()] = parse(text)
    cluster = parameters.pop("cluster", None)
    try:
        executor = submitit.AutoExecutor(folder=f"{folder}/{LOGS}", cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        raise ConfigError(f"executor: slurm: {' '.join(str(error).split())}") from None
    yield executor


EXECUTORS: dict[str, Callable[[str, str], AbstractContextManager[Executor]]] = {
    "dask": _dask,
    "mpi": _mpi,
    "slurm": _slurm,
}
"""By name."""


def named(text: str, folder: str) -> AbstractContextManager[Executor]:
    """An executor as the command line names it: NAME or NAME:WHERE. folder: for what it writes. ConfigError."""
    name, _, where = text.partition(":")
    if name not in EXECUTORS:
        raise ConfigError(f"executor: there is no {name!r}; {near(name, EXECUTORS)}")
    return EXECUTORS[name](where, folder)
