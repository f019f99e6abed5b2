"""What the MMU does, told as it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigError
from .callbacks import EVENTS, EventHook
from .counters import EXIT_REASONS
from .mmu import FLUSHES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .mmu import Mmu

__all__ = ["EVENTS", "Event", "on_event"]


class Event(NamedTuple):
    """Something the MMU did: `kind`, one of EVENTS.

    exit: `detail` is the reason, `vcpu` took it, `address` is the linear address or the value of the register.
    zap: the shadow page number `detail` goes, that of gfn `address`. protect: the shadow entry number `detail` lost
    write access, its frame, gfn `address`, became a guest table. flush: TLBs have to be flushed, `detail` says why: of
    what leads to one of `frames` guest frames from gfn `address` on; 0: of all.
    """

    kind: str
    detail: str | int
    vcpu: int | None
    address: int
    frames: int = 0


def on_event(mmu: Mmu, callback: Callable[[Event], object] | None, kinds: Iterable[str] = EVENTS) -> None:
    """VM.on_event, of its MMU."""
    if callback is None:
        EventHook.remove(mmu)
        return
    if not callable(callback):
        raise ConfigError(f"on_event: a callable or None is needed, not {callback!r}")

    def tell(kind: str, detail: int, vcpu: int | None, address: int, frames: int) -> None:
        named: str | int = detail
        if kind == "exit":
            named = EXIT_REASONS[detail]
        elif kind == "flush":
            named = FLUSHES[detail]
        callback(Event(kind, named, vcpu, address, frames))

    EventHook(mmu, tell, (kinds,) if isinstance(kinds, str) else tuple(kinds))
