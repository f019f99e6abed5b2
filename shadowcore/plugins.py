"""Policies and decisions that other packages, and scripts, bring: classes, known by a name.

A class is known from when it is made (`class Mine(sc.Policy, name="mine")`), or by an entry point of an installed
package in the group `shadowcore.policies` or `shadowcore.designs`, which is imported when a VM is made with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ANSWERS = ("emulate", "unprotect", "unsync", "zap")
"""What `Decisions.store` can answer."""


class _Kept:
    """What a plug-in says of itself for `VM.save`."""

    compiled: ClassVar[Any] = None

    def state(self) -> bytes:
        """What it keeps, in bytes (or a buffer of them), for `VM.save`. Without such a method nothing, and a machine
        with a plug-in that has attributes of its own cannot be saved."""
        if set(getattr(self, "__dict__", {"?": 0})) - {"pages"}:
            raise NotImplementedError(f"{type(self).__name__}.state")
        return b""

    def restore(self, state: bytes) -> None:
        """Go on from what `state` gave; of a new object, before anything else. The bytes come from a file, and can be
        anything: what is raised for such is SnapshotError's reason."""
        if state:
            raise ValueError("there is no method `restore`")


class Policy(_Kept):
    """Which shadow page is recycled, in Python: for prototypes. Subclasses have a `name`, by which `Shadow.policy` and
    `--set policy=` find them, and a method `victim`; each VM has an object of its own, made without arguments.

    It is told, and asked, at events that are slow anyway: a page is made or zapped, a fault, a link or a load of CR3
    came through it (`Shadow.uses`), pages run short. A page is its number in the pool. It may not use the VM.

    pages: read-only array (`Mmu.arrays["pages"]`) of the pages' headers: gfn, role, root_count (not 0: a root in use,
        which is no victim), present (entries that are not 0), active; set before anything is told.
    compiled: None, or a capsule with functions (`sc_policy_plugin` of shadowcore_plugin.h): these are told and asked,
        and no object is made.

    >>> class Anything(sc.Policy, name="anything"):
    ...     def victim(self):
    ...         return None
    >>> sc.VM("1MiB", sc.Shadow.cached(policy="anything")).mmu.design.policy
    'anything'
    """

    name: ClassVar[str] = ""
    pages: NDArray[np.void]

    def __init_subclass__(cls, name: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        _known(cls, Policy, name)

    def made(self, page: int) -> None:
        """The page is in use, for what its header says."""

    def used(self, page: int) -> None:
        """The page was used, by what `Shadow.uses` says is a use."""

    def gone(self, page: int) -> None:
        """The page was zapped, by whatever."""

    def victim(self) -> int | None:
        """The page that goes next: one in use that is no root. None: that which was made first."""
        raise NotImplementedError(f"{type(self).__name__}.victim")


@dataclass(frozen=True)
class TableStore:
    """A store to a guest table that has a shadow.

    gva, gpa: of the store; gva is None where a leaf table is about to run out of sync, at a load or store through a
        mapping of it; then gpa is that of the table.
    gfn: of the table. nbytes: of the store, or 0.
    pages: numbers of the shadow pages of the table. levels: the level of each.
    in_use: one of them is a root in use, so that the table stays write-protected.
    unsync: "unsync" can be answered.

    >>> sc.TableStore(0x1000, 0x2008, 2, 8, (5,), (1,), False, False).levels
    (1,)
    """

    gva: int | None
    gpa: int
    gfn: int
    nbytes: int
    pages: tuple[int, ...]
    levels: tuple[int, ...]
    in_use: bool
    unsync: bool


class Decisions(_Kept):
    """What becomes of a store to a guest table, in Python. Subclasses have a `name`, by which `Shadow.decides` and
    `--set decides=` find them, and a method `store`; each VM has an object of its own, made without arguments.

    pages: read-only array (`Mmu.arrays["pages"]`) of the shadow pages' headers; set before anything is asked.
    compiled: as of Policy (`sc_decisions_plugin`).

    >>> class Gentle(sc.Decisions, name="gentle"):
    ...     def store(self, table):
    ...         return "unsync" if table.unsync else "emulate"
    >>> sc.VM("1MiB", sc.Shadow.unsync(decides="gentle")).mmu.design.decides
    'gentle'
    """

    name: ClassVar[str] = ""
    pages: NDArray[np.void]

    def __init_subclass__(cls, name: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        _known(cls, Decisions, name)

    def store(self, table: TableStore) -> str:
        """One of ANSWERS. "emulate": do the store, and drop what was made of the entry. "zap": zap what shadows the
        table, and do the store. "unprotect": zap it, and let the guest store by itself, and whatever comes next, until
        the table is used as one again. "unsync": let the table run out of sync until the guest flushes. What cannot be
        done ("unprotect" of a root in use; "unsync" where `table.unsync` is not set) is emulated."""
        raise NotImplementedError(f"{type(self).__name__}.store")


GROUPS: dict[type, str] = {Policy: "shadowcore.policies", Decisions: "shadowcore.designs"}
"""The groups of entry points."""
_CLASSES: dict[type, dict[str, type]] = {Policy: {}, Decisions: {}}


def _known(cls: type, base: type, name: object) -> None:
    if name is None:
        return
    if not isinstance(name, str) or not name or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"name: letters, digits, - and _ are needed, not {name!r:.60}")
    cls.name = name  # type: ignore[attr-defined]
    _CLASSES[base][name] = cls


def _entries(base: type) -> Any:
    """Entry points of the group, by name."""
    from importlib.metadata import entry_points  # slow to import, and seldom asked

    return entry_points(group=GROUPS[base])


def names(base: type) -> list[str]:
    """The names of all that there are of Policy or Decisions, as far as is known without an import."""
    return sorted({*_CLASSES[base], *_entries(base).names})


def find(base: type, name: str) -> Any:
    """The class of that name, or the capsule that an entry point leads to. ConfigError if there is none, or its package
    cannot be imported, or has something else."""
    if name in _CLASSES[base]:
        return _CLASSES[base][name]
    for entry in _entries(base).select(name=name):
        try:
            cls = entry.load()
        except Exception as error:
            raise ConfigError(f"{name!r}: {entry.value} of {GROUPS[base]} cannot be imported: {error}") from error
        if not _is_capsule(cls) and not (isinstance(cls, type) and issubclass(cls, base)):
            wanted = f"no subclass of shadowcore.{base.__name__}, and no capsule"
            raise ConfigError(f"{name!r}: {entry.value} of {GROUPS[base]} is {wanted}")
        return cls
    raise ConfigError(f"there is no {name!r:.60}")


def _is_capsule(found: object) -> bool:
    return type(found).__name__ == "PyCapsule"


def made(base: type, name: str) -> Any:
    """An object of the class of that name, or the capsule; ConfigError if it cannot be made."""
    cls = find(base, name)
    capsule = cls if _is_capsule(cls) else cls.compiled
    if capsule is not None:
        if not _is_capsule(capsule):
            raise ConfigError(f"{name!r}: {cls.__qualname__}.compiled is no capsule: {capsule!r:.60}")
        return capsule
    try:
        return cls()
    except Exception as error:
        raise ConfigError(f"{name!r}: an object of {cls.__qualname__} cannot be made: {error}") from error
