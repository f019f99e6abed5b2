"""The complete state of a VM in one file: versioned, checked, and loaded whole or not at all.

The file is an .npz archive: a JSON text `state` (version, settings, registers, scalars, counters), the arrays of the
engine, the frames of RAM that are not all zero, and `digest`, the SHA-256 of all the rest. Nothing in it is code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import TLB, Features, MemorySlot, Native, Quirk, Shadow
from .errors import AuditError, SnapshotError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .machine import VM

FORMAT = "shadowcore VM"
VERSION = 1
"""Of the format; a file of another one is refused."""
NONE = 0xFFFFFFFF
LIST_MANY = 0x80000000
_ARRAYS = ("table", "pages", "frames", "links", "hash")
_UNFIT = (KeyError, ValueError, TypeError, OverflowError, IndexError, AttributeError, MemoryError)
"""What making a VM of a state raises that does not fit together."""


def save(vm: VM, path: str | os.PathLike[str]) -> None:
    """Write the state of `vm` to `path`, by way of a file beside it, so that a failure leaves an older one alone."""
    vm.mmu.settle()
    members = _members(vm)
    state: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "memory": int(vm.memory.bytes.size),
        "slots": [[slot.gpa, slot.size] for slot in vm.memory.slots],
        "logged": sorted(int(name.removeprefix("log_")) for name in members if name.startswith("log_")),
        "design": {"kind": type(vm.mmu.design).__name__, **dataclasses.asdict(vm.mmu.design)},
        "features": dataclasses.asdict(vm.features),
        "tlb": None if vm.tlb is None else dataclasses.asdict(vm.tlb),
        "mmu": vm.mmu.export_state(),
        "vcpus": [cpu.export_state() for cpu in vm.vcpus],
    }
    text = json.dumps(state, sort_keys=True)
    beside = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(beside, "wb") as file:
            members |= {"state": np.array(text), "digest": np.array(_digest(text, members))}
            np.savez_compressed(file, **members)  # type: ignore[arg-type]
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def load(path: str | os.PathLike[str], memory: NDArray[np.uint8] | None = None) -> VM:
    """A VM that continues bit for bit as the saved one would. SnapshotError for a file that is not whole and sound.

    memory: an array of the right size for its RAM, which is overwritten. ConfigError if it is none.
    """
    state, members = _read(path)
    try:
        vm = _machine(state, memory)
        _restore(vm, state, members, memory is None)
    except _UNFIT as error:
        if isinstance(error, SnapshotError):
            raise SnapshotError(path, error.expected) from None
        raise SnapshotError(path, f"a state that a VM can have expected: {error}") from None
    try:
        vm.mmu.settle()
    except AuditError as error:
        raise SnapshotError(path, f"a sound shadow structure expected: {error.violations[0]}") from None
    return vm


def _members(vm: VM) -> dict[str, NDArray[Any]]:
    """Every array of the state, by its name in the file; of the shadow, the active part of what is large."""
    members: dict[str, NDArray[Any]] = {}
    ram = vm.memory.words.reshape(-1, 512)
    used = np.flatnonzero(ram.any(axis=1))
    members["ram_frame"], members["ram"] = used.astype(np.uint64), ram[used]
    for slot in vm.memory.logged_slots:
        members[f"log_{slot}"] = vm.memory.dirty_words(slot)
    for cpu in vm.vcpus:
        for part, array in enumerate(cpu.tlb_arrays):
            members[f"tlb_{cpu.number}_{part}"] = array
    if isinstance(vm.mmu.design, Shadow):
        for name in _ARRAYS:
            array = vm.mmu.arrays[name]
            members[f"mmu_{name}"] = array.view(np.uint8).reshape(len(array), -1)
    return members


def _digest(text: str, members: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(members):
        array = np.ascontiguousarray(members[name])
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            members = {name: archive[name] for name in archive.files}
        text, digest = str(members.pop("state")), str(members.pop("digest"))
        state = json.loads(text)
    except FileNotFoundError as error:
        raise SnapshotError(path, f"a readable file expected: {error.strerror}") from None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        raise SnapshotError(path, f"a saved VM expected: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise SnapshotError(path, "a saved VM expected, this is something else")
    if state.get("version") != VERSION:
        raise SnapshotError(path, f"version {VERSION} of the format expected, not {state.get('version')!r}")
    if _digest(text, members) != digest:
        raise SnapshotError(path, "the file was altered: its digest is not that of its contents")
    return state, members


def _machine(state: dict[str, Any], memory: NDArray[np.uint8] | None) -> VM:
    from .machine import VM

    design = dict(state["design"])
    kind = design.pop("kind")
    mmu: Native | Shadow = Native() if kind == "Native" else Shadow(**{**design, "quirks": Quirk(design["quirks"])})
    slots = [
        MemorySlot(gpa, size, dirty_log=number in state["logged"]) for number, (gpa, size) in enumerate(state["slots"])
    ]
    tlb = None if state["tlb"] is None else TLB(**state["tlb"])
    features = Features(**state["features"])
    if memory is None:
        return VM(slots, mmu, len(state["vcpus"]), tlb, features=features)
    return VM(memory, mmu, len(state["vcpus"]), tlb, features=features, slots=slots)


def _restore(vm: VM, state: dict[str, Any], members: dict[str, NDArray[Any]], fresh: bool) -> None:
    expected = set(_members(vm))
    if set(members) != expected:
        raise SnapshotError("", f"arrays {sorted(expected)} expected, not {sorted(members)}")
    ram = vm.memory.words.reshape(-1, 512)
    frames = members["ram_frame"]
    if frames.dtype != np.uint64 or (len(frames) and int(frames.max()) >= len(ram)):
        raise SnapshotError("", "frames of RAM within its size expected")
    _put(ram[:0], members["ram"][:0])
    if not fresh:
        ram[:] = 0
    ram[frames] = members["ram"]
    for slot in state["logged"]:
        _put(vm.memory.dirty_words(slot), members[f"log_{slot}"])
    if isinstance(vm.mmu.design, Shadow):
        arrays = vm.mmu.arrays
        saved = {name: members[f"mmu_{name}"] for name in _ARRAYS}
        loose = {name: np.zeros(arrays[name].shape, arrays[name].dtype) for name in _ARRAYS}
        for name in _ARRAYS:
            _put(loose[name].view(np.uint8).reshape(len(loose[name]), -1), saved[name])
        _check_shadow(vm, state, loose)
        _write_shadow(vm, saved)
    vm.mmu.import_state(state["mmu"])
    for cpu, registers in zip(vm.vcpus, state["vcpus"], strict=True):
        cpu.import_tlb([members[f"tlb_{cpu.number}_{part}"] for part in range(len(cpu.tlb_arrays))])
        cpu.import_state(registers)


def _write_shadow(vm: VM, saved: dict[str, NDArray[Any]]) -> None:
    """What is written is checked when the VM is first used; no array is held beyond this call."""
    for name, array in vm.mmu.writable_arrays().items():
        # Only what is not zero is touched: the large arrays are committed by the host page by page.
        flat, source = array.view(np.uint8).reshape(-1), saved[name].reshape(-1)
        touched = np.flatnonzero(source)
        flat[:] = 0
        flat[touched] = source[touched]


def _put(target: NDArray[Any], source: NDArray[Any]) -> None:
    if source.dtype != target.dtype or source.shape != target.shape:
        raise SnapshotError("", f"{target.dtype}{list(target.shape)} expected, not {source.dtype}{list(source.shape)}")
    target[...] = source


def _check_shadow(vm: VM, state: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Every index that the engine follows stays within its array; the audit sees to what they mean."""
    pool = len(arrays["pages"])
    sptes = pool * 512
    pages, table = arrays["pages"], arrays["table"]

    def within(values: NDArray[Any], limit: int, what: str, none: bool = True) -> None:
        if np.any((values >= limit) & ~((values == NONE) & none)):
            raise SnapshotError("", f"{what} within 0 to {limit - 1} expected")

    for name in ("hash_next", "prev", "next"):
        active = pages["active"] != 0
        within(pages[name][active] if name != "next" else pages[name], pool, f"pages.{name}")
    within(pages["active"], 2, "pages.active", none=False)
    within(arrays["hash"], pool, "hash")
    for values in (pages["parents"], arrays["frames"]["rmap"]):
        within(values & ~np.uint32(LIST_MANY), sptes + 1, "list heads", none=False)
    for name in ("prev", "next"):
        within(arrays["links"][name], sptes + 1, f"links.{name}", none=False)
    for name in ("free_head", "young", "old"):
        within(np.array([state["mmu"][name]]), pool, name)
    for registers in state["vcpus"]:
        within(np.array(registers["roots"]), pool, "roots")
    level = (pages["role"] >> 4) & 15
    within(level[pages["active"] != 0] - np.uint32(1), 5, "levels", none=False)
    address = (table & np.uint64(0x000FFFFFFFFFF000)) >> np.uint64(12)
    present = (table & np.uint64(1)) != 0
    leaf = present & (level == 1)[:, None]
    frame = address - np.uint64(vm.memory.ram_hpa >> 12)
    within(frame[leaf], vm.memory.bytes.size >> 12, "frames that leaves map", none=False)
    link = (table != 0) & (level > 1)[:, None]
    within(
        (address - np.uint64(vm.memory.pool_hpa >> 12))[link],
        pool,
        "pages that upper entries lead to",
        none=False,
    )
    used = np.unpackbits(pages["used"].view(np.uint8).reshape(pool, 64), axis=1, bitorder="little")
    if np.any(used.astype(bool) != (table != 0)):
        raise SnapshotError("", "bitmaps of used entries that agree with the entries expected")
