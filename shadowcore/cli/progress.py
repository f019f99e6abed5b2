"""Progress of long work: a bar with rate and remaining time on standard error while that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, unit: str, shown: bool = True) -> Iterator[Callable[..., None] | None]:
    """A function to call with (done, total), total 0 while that is not known, and a new label if it has changed; None
    where nothing is shown."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed / 1e6:,.1f} M {unit}/s" if speed else "", "progress.data.speed")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} " + unit), Rate())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, text=label: bar.update(task, completed=done, total=total or None, description=text)


@contextmanager
def counted(unit: str) -> Iterator[Callable[[int, int, int, bool], None] | None]:
    """A function to call with (done, failed, total, stopping): a bar with all of these, the rate and the time left.

    It begins with the first call, for it has a thread of its own, and by then processes have been forked.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f}/s" if speed else "", "progress.data.speed")

    columns = (BarColumn(), TextColumn("{task.completed:,} of {task.total:,} {task.description}"), Rate())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = None

    def show(done: int, failed: int, total: int, stopping: bool) -> None:
        nonlocal task
        text = unit + (f", {failed:,} failed" if failed else "")
        if stopping:
            text += "; what is running ends, Ctrl-C drops it"
        if task is None:
            bar.start()
            task = bar.add_task(text, total=total, completed=done)
        bar.update(task, completed=done, total=total, description=text)

    try:
        yield show
    finally:
        if task is not None:
            bar.stop()
