"""The processes that an importer meets, and which of them runs."""

from __future__ import annotations

from typing import Any

from ..format import Event
from ..writer import Writer


class Processes:
    """The processes of a recording, by number, and which of them runs."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.by_pid: dict[int, int] = {}
        self.running: int | None = None

    def new(self, pid: int | None, parent: int | None = None, **more: Any) -> int:
        """Note a process in the recording's header, with `more` said of it; its number."""
        number = len(self.writer.processes)
        self.writer.processes.append({"number": number, "pid": pid, "parent": parent, **more})
        if pid is not None:
            self.by_pid[pid] = number
        return number

    def run(self, number: int) -> None:
        """From here on process `number` runs."""
        if number != self.running:
            self.writer.event(Event.RUN, number)
            self.running = number

    def child(self, parent: int, pid: int) -> int:
        """The number of a process that `parent` made, which may have been met already."""
        number = self.by_pid.get(pid)
        if number is None:
            return self.new(pid, parent)
        self.writer.processes[number]["parent"] = parent
        return number
