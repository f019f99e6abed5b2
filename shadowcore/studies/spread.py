"""Runs of a sweep, spread over processes of its own or over whatever has `submit`, short ones several to a task."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import connection
from types import FrameType, TracebackType
from typing import Any, Protocol

from ..errors import ShadowcoreError
from .plan import Run
from .shared import Shared
from .store import Store, StoreError
from .work import Done, Task, failed, work

LOCAL, REMOTE = 0.25, 5.0
"""Seconds that a task lasts, about: in a process of this machine, and elsewhere."""
_POLL = 0.25
"""Seconds between two looks at futures that do not tell when they are done."""
_UNKNOWN = 64
"""Tasks at a time for an executor that does not tell how many it does."""


class SweepError(ShadowcoreError):
    """What a sweep ran on has failed. Results that were kept by then stay: a sweep that resumes goes on from them.

    >>> issubclass(sc.SweepError, sc.ShadowcoreError)
    True
    """


class Executor(Protocol):
    """What runs tasks: executors of concurrent.futures, Dask's Client, mpi4py's pools, submitit's executors.

    `submit` gives an object with `result()` and `done()`; `add_done_callback` and `cancel` are used where it has them.
    """

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Have it called somewhere."""


class Stop:
    """Ctrl-C while a sweep is running: the first one sets `asked`, so that what runs may end; the next one is raised.

    Other threads than the main one, and callers that handle the signal themselves, keep what they have.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def spread(
    runs: list[Run],
    sources: dict[int, Shared],
    store: tuple[str, str] | None,
    stop: Stop,
    *,
    jobs: int | None = None,
    executor: Executor | None = None,
    together: int | None = None,
) -> Iterator[list[Done]]:
    """What each task came to, as they end; an empty list now and then, while none does.

    jobs: processes (1: none but this one), or tasks at a time that an executor is given. together: runs in a task;
    None: as many as last a while. When `stop` is asked for, nothing more is begun.

    SweepError: the executor has failed. StoreError: a result could not be kept.
    """
    if executor is not None:
        width = jobs or 2 * _width(executor)
        yield from _Spread(executor, runs, sources, store, stop, width, REMOTE, together).results()
        return
    wanted = min(jobs or processors(), len(runs))
    if wanted <= 1:
        for run in runs:
            if not stop.asked:
                yield work(Task((run,), {run.source: sources[run.source]}, store))
        return
    left = runs
    while left:
        with _Processes(wanted) as pool:
            made = _Spread(pool, left, sources, store, stop, 2 * wanted, LOCAL, together)
            try:
                yield from made.results()
                return
            except SweepError:
                pass
        # A process has died. What was under way is run again one by one, so that the run that did it is told.
        for run in made.under_way():
            if not stop.asked:
                with _Processes(1) as pool:
                    try:
                        yield from _Spread(pool, [run], sources, store, stop, 1, LOCAL, 1).results()
                    except SweepError:
                        yield [_died(run, store)]
        left = list(made.waiting)


def _died(run: Run, store: tuple[str, str] | None) -> Done:
    result = failed(run.key, SweepError("the process that ran it died"))
    if store is not None:
        Store(store[0]).put(result)
    return Done(run.key, result["error"], 0.0, None if store is not None else result)


def _width(executor: Executor) -> int:
    """Tasks that it does at a time, if it tells."""
    with suppress(Exception):  # what other packages' objects do when they are asked is not known
        for name in ("num_workers", "_max_workers"):
            found = getattr(executor, name, None)
            if isinstance(found, int) and found > 0:
                return found
        threads = getattr(executor, "nthreads", None)
        if callable(threads):
            return sum(threads().values()) or _UNKNOWN
    return _UNKNOWN


class _Spread:
    """Runs on one executor."""

    def __init__(
        self,
        executor: Executor,
        runs: list[Run],
        sources: dict[int, Shared],
        store: tuple[str, str] | None,
        stop: Stop,
        width: int,
        lasting: float,
        together: int | None,
    ) -> None:
        self.executor = executor
        self.waiting = deque(runs)
        self.sources = sources
        self.store = store
        self.stop = stop
        self.width = width
        self.lasting = lasting
        self.together = together
        self.flying: dict[int, tuple[Any, tuple[Run, ...]]] = {}
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.silent: set[int] = set()
        self.began = 0
        self.seconds = 0.0
        self.done = 0

    def under_way(self) -> list[Run]:
        """Runs that were begun and did not end."""
        return [run for _, runs in self.flying.values() for run in runs]

    def results(self) -> Iterator[list[Done]]:
        try:
            yield from self._results()
        except (KeyboardInterrupt, GeneratorExit):
            self._drop()
            raise

    def _results(self) -> Iterator[list[Done]]:
        self._fill()
        stopped = False
        while self.flying:
            if self.stop.asked and not stopped:
                stopped = True
                self._cancel()
            number = self._next()
            if number is None:
                yield []
                continue
            done = self._result(number)
            self.done += len(done)
            self.seconds += sum(each.seconds for each in done)
            yield done  # before anything that may fail: they are done
            if not self.stop.asked:
                self._fill()

    def _chunk(self) -> int:
        if self.together is not None:
            return self.together
        if not self.done:
            return 1
        lasting = int(self.lasting * self.done / max(self.seconds, 1e-6))
        # Towards the end tasks become short again, so that all end at about the same time.
        return max(1, min(lasting, len(self.waiting) // self.width))

    def _fill(self) -> None:
        while self.waiting and len(self.flying) < self.width:
            runs = tuple(self.waiting.popleft() for _ in range(min(self._chunk(), len(self.waiting))))
            task = Task(runs, {run.source: self.sources[run.source] for run in runs}, self.store)
            self.began += 1
            self.flying[self.began] = (None, runs)
            try:
                future = self.executor.submit(work, task)
            except Exception as error:
                raise self._failed(error) from None
            self.flying[self.began] = (future, runs)
            tell = getattr(future, "add_done_callback", None)
            if tell is None:
                self.silent.add(self.began)
            else:
                tell(lambda _, number=self.began: self.ended.put(number))

    def _next(self) -> int | None:
        """A task that has ended, or None after a while."""
        for number in self.silent:
            if self.flying[number][0].done():
                self.silent.remove(number)
                return number
        with suppress(queue.Empty):
            return self.ended.get(timeout=_POLL)
        return None

    def _result(self, number: int) -> list[Done]:
        future, _ = self.flying[number]
        try:
            done: list[Done] = future.result()
        except StoreError:
            self._cancel()
            raise
        except CancelledError:
            done = []
        except Exception as error:
            self._cancel()
            raise self._failed(error) from None
        del self.flying[number]
        return done

    def _cancel(self) -> None:
        """What has not begun does not begin. Outside of concurrent.futures, to cancel may be to kill what runs."""
        for future, _ in self.flying.values():
            if isinstance(future, concurrent.futures.Future):
                future.cancel()

    def _drop(self) -> None:
        """What is running is not wanted any more."""
        for future, _ in self.flying.values():
            cancel = getattr(future, "cancel", None)
            if cancel is not None:
                with suppress(Exception):
                    cancel()

    def _failed(self, error: Exception) -> SweepError:
        what = "a process died" if isinstance(error, BrokenExecutor) else type(error).__name__
        message = " ".join(str(error).split())
        return SweepError(f"executor: {what}: {message or 'no reason given'}; what was done by then is kept")


class _Processes:
    """Processes on this machine, which die with this one, and which Ctrl-C leaves alone."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context(_method())
        self._others = set(multiprocessing.active_children())
        self._executor = ProcessPoolExecutor(count, context, _begin)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        return self._executor.submit(function, *arguments)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        if error is not None:  # also when nobody asks for results any more
            for child in set(multiprocessing.active_children()) - self._others:
                child.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _method() -> str:
    """A fork takes along what is imported and open already; with other threads about it is not safe."""
    if sys.platform != "linux":
        return "spawn"
    if threading.active_count() == 1:
        return "fork"
    multiprocessing.get_context("forkserver").set_forkserver_preload([f"{__package__}.work"])
    return "forkserver"


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
