"""Audits in the course of a run: when they are due, how many there were, and where one found something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import AuditError

POINTS = ("pre-fault", "post-fault", "pre-write", "post-write", "post-cr3", "pre-sync", "post-sync")
"""Where `vm.audit_points` can have audits: the names of POINT_* in hooks.pxd, in their order."""


class Audits:
    """Checks every invariant of a VM, `made` times, and raises AuditError with `record`, the operations done, and
    `audits`.

    every: operations between two audits (0: none at all).
    """

    def __init__(self, vm: Any, every: int) -> None:
        self._vm, self._every = vm, every
        self._last = self.made = 0

    def due(self, done: int) -> bool:
        """So many operations are done, and the next audit is to be made."""
        return bool(self._every) and done - self._last >= self._every

    def look(self, done: int) -> None:
        """Audit."""
        if not self._every:
            return
        self._last = done
        self.made += 1
        self._vm.audit(strict=True)

    @contextmanager
    def told(self, done: Any) -> Iterator[None]:
        """What an AuditError in here is told: done() operations, and the audits so far."""
        try:
            yield
        except AuditError as error:
            if error.record is None:
                error.record = done()
            error.audits = self.made
            raise
