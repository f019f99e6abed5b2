"""The complete state of a VM in one file: versioned, checked, and loaded whole or not at all.

The file is an .npz archive: a JSON text `state` (version, settings, registers, scalars, counters), the arrays of the
engine, the frames of RAM that are not all zero, and `digest`, the SHA-256 of all the rest. Nothing in it is code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from .. import npy
from ..config import PAGE_SIZE, POLICIES, TLB, Design, Features, MemorySlot, Native, Nested, Quirk, Shadow
from ..errors import AuditError, ConfigError, PluginError, SnapshotError
from ..files import Replacement, check_path
from .mmu import FRAME_DTYPE, HISTORY_DTYPE, LINK_DTYPE, MEMBER_DTYPE, PAGE_DTYPE
from .slots import checked_slots
from .tlbs import ProcessorTLB, restored, saved
from .vcpu import tlb_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from .audit import AuditReport
    from .memory import Memory
    from .mmu import Mmu
    from .vcpu import VCpu

    class Machine(Protocol):
        """What is saved: machine.VM."""

        memory: Memory
        mmu: Mmu
        vcpus: tuple[VCpu, ...]
        features: Features
        tlb: TLB | ProcessorTLB | None

        def audit(self) -> AuditReport: ...


M = TypeVar("M", bound="Machine")
T = TypeVar("T")

FORMAT = "shadowcore VM"
VERSION = 3
"""Of the format; a file of another one is refused."""
SC_NONE = 0xFFFFFFFF
LIST_MANY = 0x80000000
ROLE_LEVEL = 4
PTE_PS = 1 << 7
_UNFIT = (KeyError, ValueError, TypeError, OverflowError, IndexError, AttributeError)
"""What making a VM of a state raises that does not fit together."""
RATIO = 1100
"""Bytes that one byte of an archive can unpack to, and a little more: deflate reaches 1032."""
_BACKING = "host_frames", "host_blocks"
"""Arrays of what the host has, if that is kept account of."""
RAM_MAX = 1 << 46
"""Bytes of RAM of a VM: more than any host maps for a process."""


def save(vm: Machine, path: str | os.PathLike[str]) -> None:
    """Write the state of `vm` to `path`, by way of a file beside it, so that a failure leaves an older one alone.

    OSError where it cannot be written, or the disk is full. AuditError, and nothing written, where the shadow
    structure was written by hand and does not hold.
    """
    path = check_path(path)
    members, state = _state(vm)
    state["violations"] = vm.audit().count
    text = json.dumps(state, sort_keys=True)
    members |= {"state": np.array(text), "digest": np.array(_digest(text, members))}
    with Replacement(path) as file:
        np.savez_compressed(file, **members)  # type: ignore[arg-type]


def copy(make: Callable[..., M], vm: Machine) -> M:
    """Another VM, made by `make`, in the state of `vm`, which stays as it is. Callbacks are no part of a state.
    MemoryError where the host has no room for its RAM once more."""
    members, state = _state(vm)
    state = json.loads(json.dumps(state))
    slots, mmu, features, tlb, vcpus = _settings(state)
    twin = make(state["memory"], mmu, vcpus, tlb, features=features, slots=slots or [None])
    _restore(twin, state, members, True)
    twin.mmu.settle()
    _restore_plugins(twin, members)
    return twin


def _state(vm: Machine) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and plain values that are the state of `vm`."""
    vm.mmu.settle()
    members = _members(vm)
    return members, {
        "format": FORMAT,
        "version": VERSION,
        "memory": int(vm.memory.bytes.size),
        "slots": _slots(vm.memory),
        "backing": bool(vm.memory.backing_arrays()),
        "logged": sorted(int(name.removeprefix("log_")) for name in members if name.startswith("log_")),
        "design": {"kind": type(vm.mmu.design).__name__, **dataclasses.asdict(vm.mmu.design)},
        "features": dataclasses.asdict(vm.features),
        "tlb": saved(vm.tlb),
        "mmu": vm.mmu.export_state(),
        "vcpus": [cpu.export_state() for cpu in vm.vcpus],
    }


def _slots(memory: Memory) -> list[Any]:
    """What makes each slot: gpa, size, and the size of the host's pages under it where that is not the usual one.

    Where slots are not all of guest RAM, one after the other and without a number between them that is free, or one is
    read-only: gpa, size, size of the host's pages, byte of guest RAM, whether it is read-only; None for a free number.
    """
    places = [slot and memory.frame(slot.gpa >> 12) * PAGE_SIZE for slot in memory.slots]
    at, plain = 0, all(memory.slots)
    for slot, place in zip(memory.slots, places, strict=True):
        if slot:
            plain = plain and place == at and not slot.read_only
            at += int(slot.size)
    if plain and at == memory.bytes.size:
        return [
            [slot.gpa, slot.size, *([] if slot.host_page_size == PAGE_SIZE else [slot.host_page_size])]
            for slot in memory.slots
            if slot
        ]
    return [
        slot and [slot.gpa, slot.size, slot.host_page_size, place, slot.read_only]
        for slot, place in zip(memory.slots, places, strict=True)
    ]


def load(make: Callable[..., M], path: str | os.PathLike[str], memory: NDArray[np.uint8] | None = None) -> M:
    """A VM, made by `make`, that continues bit for bit as the saved one would. SnapshotError for a file that is not
    whole and sound.

    memory: an array of the right size for its RAM, which is overwritten. ConfigError if it is none. MemoryError where
    the host has no room. What the file makes it do is bounded by the size of the file.
    """
    path = check_path(path)
    try:
        state, members = _read(path)
        slots, mmu, features, tlb, vcpus = _settings(state)
        size = int(state["memory"])
    except _UNFIT as error:
        raise _unfit(path, error) from None
    if memory is None:
        vm = make(size, mmu, vcpus, tlb, features=features, slots=slots or [None])
    else:
        if isinstance(memory, np.ndarray) and memory.size != size:
            raise ConfigError(f"memory: an array of {size} bytes is needed, this has {memory.size}")
        vm = make(memory, mmu, vcpus, tlb, features=features, slots=slots or [None])
    try:
        _restore(vm, state, members, memory is None)
    except _UNFIT as error:
        raise _unfit(path, error) from None
    try:
        vm.mmu.settle()
    except AuditError as error:
        raise SnapshotError(path, f"a sound shadow structure expected: {error.violations[0]}") from None
    try:
        _restore_plugins(vm, members)
    except PluginError as error:
        raise SnapshotError(path, f"what a plug-in can have kept expected: {error}") from error.__cause__
    report = vm.audit()
    if report.count != state.get("violations", 0):
        first = f": {report.violations[0]}" if report.violations else ""
        expected = f"as many violations of invariants as the file says expected, there are {report.count}{first}"
        raise SnapshotError(path, expected)
    return vm


def _unfit(path: str | os.PathLike[str], error: Exception) -> SnapshotError:
    if isinstance(error, SnapshotError):
        return SnapshotError(path, error.expected)
    return SnapshotError(path, f"a state that a VM can have expected: {error}")


def _members(vm: Machine) -> dict[str, NDArray[Any]]:
    """Every array of the state, by its name in the file; of the shadow, the active part of what is large."""
    members: dict[str, NDArray[Any]] = {}
    ram = vm.memory.words.reshape(-1, 512)
    used = np.flatnonzero(ram.any(axis=1))
    members["ram_frame"], members["ram"] = used.astype(np.uint64), ram[used]
    for slot in vm.memory.logged_slots:
        members[f"log_{slot}"] = vm.memory.dirty_words(slot)
    for name, array in zip(_BACKING, vm.memory.backing_arrays(), strict=False):
        members[name] = array
    for cpu in vm.vcpus:
        for part, array in enumerate(cpu.tlb_arrays):
            members[f"tlb_{cpu.number}_{part}"] = array
    if not isinstance(vm.mmu.design, Native):
        for name, array in vm.mmu.arrays.items():
            members[f"mmu_{name}"] = array.view(np.uint8).reshape(len(array), -1)
    for name, kept in vm.mmu.export_plugins().items():
        members[f"plugin_{name}"] = np.frombuffer(kept, np.uint8)
    return members


def _digest(text: str, members: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(members):
        array = np.ascontiguousarray(members[name])
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _of_another_version(version: Any) -> str:
    """Why a file of that version is not loaded."""
    if isinstance(version, int) and 0 < version < VERSION:
        return (
            f"a file of version {version}, by an older shadowcore, lacks state that machines have now: only the "
            f"release that wrote it can go on from there (version {VERSION} is needed)"
        )
    if isinstance(version, int) and version > VERSION:
        return f"a file of version {version}, by a newer shadowcore; this one knows version {VERSION}"
    return f"version {VERSION} of the format expected, not {version!r}"


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The state, and the arrays that it asks for. Types and sizes are compared before an array is read: no file makes
    more memory needed than its own bytes can unpack to."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            npy.check_members(archive)
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for info in infos.values():
                if info.file_size > RATIO * info.compress_size:
                    raise ValueError(f"{info.filename} cannot hold {info.file_size} bytes")
            texts = [str(_member(archive, infos.pop(name))) for name in ("state", "digest")]
            state = json.loads(texts[0])
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                raise SnapshotError(path, "a saved VM expected, this is something else")
            if state.get("version") != VERSION:
                raise SnapshotError(path, _of_another_version(state.get("version")))
            expected = _expected(state)
            if set(infos) != set(expected):
                raise SnapshotError(path, f"arrays {sorted(expected)} expected, not {sorted(infos)}")
            members = {name: _member(archive, info, expected[name]) for name, info in infos.items()}
    except SnapshotError:
        raise
    except MemoryError:
        raise
    except OSError as error:
        raise SnapshotError(path, f"a readable file expected: {error.strerror or error}") from None
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        raise SnapshotError(path, f"a saved VM expected: {error}") from None
    if _digest(texts[0], members) != texts[1]:
        raise SnapshotError(path, "the file was altered: its digest is not that of its contents")
    return state, members


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, expected: tuple[Any, ...] | None = None) -> NDArray[Any]:
    """An array. expected: its type and shape, where None stands for any number."""
    array = npy.parse(archive.read(info))
    if expected is not None:
        wanted = tuple(n if w is None else w for n, w in zip(array.shape, expected[1], strict=False))
        if array.dtype != expected[0] or array.shape != wanted or array.ndim != len(expected[1]):
            raise ValueError(
                f"{info.filename}: {expected[0]}{list(expected[1])} expected, not {array.dtype}{list(array.shape)}"
            )
    return array


def _from_dict(cls: type[T], given: Any, **found: Any) -> T:
    """Settings of class `cls` from a dict of values of the same types as its defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, value in given.items():
        kind = type(defaults[name])
        if kind is type(None):
            kind = int  # a number, once the memory is known
        if (
            name not in found
            and type(value) is not kind
            and not (value is None and name in ("flood_threshold", "flood_forget"))
        ):
            raise ValueError(f"{name}: {kind.__name__} expected, not {value!r:.60}")
    return cls(**{**given, **found})


def _settings(
    state: dict[str, Any],
) -> tuple[list[MemorySlot | None], Design, Features, TLB | ProcessorTLB | None, int]:
    """What a VM is made of. _UNFIT for what cannot be."""
    design = dict(state["design"])
    kind, quirks = design.pop("kind"), Quirk(design.get("quirks", 0))
    for name in ("uses", "rules"):
        if name in design:
            design[name] = tuple(design[name])
    if kind not in ("Native", "Shadow", "Nested"):
        raise ValueError(f"design: Native, Shadow or Nested expected, not {state['design']!r:.60}")
    mmu: Design
    if kind == "Native":
        mmu = Native(quirks)
    elif kind == "Shadow":
        mmu = _from_dict(Shadow, design, quirks=quirks)
    else:
        mmu = _from_dict(Nested, design, quirks=quirks)
    if kind == "Native" and {**design, "quirks": quirks} != dataclasses.asdict(mmu):
        raise ValueError(f"design: Native as it can be expected, not {state['design']!r:.60}")
    logged = state["logged"]
    rows = state["slots"]
    slots = [row and MemorySlot(row[0], row[1], number in logged, *row[2:5]) for number, row in enumerate(rows)]
    if not all(type(number) is int for number in logged) or logged != [
        number for number, slot in enumerate(slots) if slot and slot.dirty_log
    ]:
        raise ValueError(f"logged: numbers of slots expected, not {logged!r:.60}")
    placed = any(row is None or len(row) > 3 for row in rows) or not rows
    ends = [int(slot.size) + (slot.offset or 0) for slot in slots if slot]
    total = max(ends, default=0) if placed else sum(ends)
    memory = state["memory"]
    if type(memory) is not int or not 0 < memory <= RAM_MAX or memory % PAGE_SIZE:
        raise ValueError(f"memory: a multiple of {PAGE_SIZE} up to {RAM_MAX} expected, not {memory!r:.60}")
    if memory < total or (memory != total and not placed):
        raise ValueError(f"memory: {total} bytes, those of the slots, expected")
    if slots:
        checked_slots(slots)
    if type(state["backing"]) is not bool:
        raise ValueError(f"backing: true or false expected, not {state['backing']!r:.60}")
    tlb: TLB | ProcessorTLB | None = None
    if state["tlb"] is not None:
        tlb = restored(state["tlb"]) if "levels" in state["tlb"] else _from_dict(TLB, state["tlb"])
    if not isinstance(state["vcpus"], list) or not 1 <= len(state["vcpus"]) <= 64:
        raise ValueError("vcpus: a list of 1 to 64 expected")
    return slots, mmu, _from_dict(Features, state["features"]), tlb, len(state["vcpus"])


def _expected(state: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Type and shape of each array of a file with this state."""
    _, mmu, _, tlb, vcpus = _settings(state)
    word, byte = np.dtype(np.uint64), np.dtype(np.uint8)
    found: dict[str, tuple[Any, ...]] = {"ram_frame": (word, (None,)), "ram": (word, (None, 512))}
    if state["backing"]:
        sizes = state["memory"] >> 12, (state["memory"] + (1 << 21) - 1) >> 21
        found |= {name: (byte, (n,)) for name, n in zip(_BACKING, sizes, strict=True)}
    for number in state["logged"]:
        found[f"log_{number}"] = word, (-(-int(state["slots"][number][1]) >> 18),)
    for number in range(vcpus):
        for part, size in enumerate(tlb_sizes(tlb)):
            found[f"tlb_{number}_{part}"] = byte, (size,)
    if not isinstance(mmu, Native):
        pages = mmu.pool_pages
        if pages is None:
            raise ValueError("design: a pool of so many pages expected")
        found["mmu_table"] = byte, (pages, 4096)
        found["mmu_pages"] = byte, (pages, PAGE_DTYPE.itemsize)
        found["mmu_frames"] = byte, (state["memory"] >> 12, FRAME_DTYPE.itemsize)
        found["mmu_links"] = byte, (512 * pages, LINK_DTYPE.itemsize)
        found["mmu_hash"] = byte, (max(4, 1 << (pages - 1).bit_length()), 4)
        if isinstance(mmu, Shadow) and mmu.policy != "fifo":
            found["mmu_members"] = byte, (3 * pages, MEMBER_DTYPE.itemsize)
            found["mmu_ghosts"] = byte, (max(4, 1 << (2 * pages - 1).bit_length()), 4)
            found["mmu_order"] = byte, (pages, 4)
        if isinstance(mmu, Shadow) and mmu.policy not in POLICIES:
            found["plugin_policy"] = byte, (None,)
        if isinstance(mmu, Shadow) and mmu.decides:
            found["plugin_decides"] = byte, (None,)
        if isinstance(mmu, Shadow) and mmu.switching:
            found["mmu_written"] = byte, (state["memory"] >> 12, 4)
        if isinstance(mmu, Nested) or mmu.lagging:
            frames = state["memory"] >> 12
            found["mmu_below"], found["mmu_mapped"] = (byte, (pages, 64)), (byte, (frames, 2))
            for name, shift in (("2m", 9), ("1g", 18)):
                found[f"mmu_large_rmap_{name}"] = byte, ((frames >> shift) + 1, 4)
                found[f"mmu_no_large_{name}"] = byte, ((frames >> shift) + 1, 4)
        if isinstance(mmu, Shadow) and mmu.adapts:
            found["mmu_history"] = byte, (4 * max(4, 1 << (pages // 2 - 1).bit_length()), HISTORY_DTYPE.itemsize)
    return found


def _restore(vm: Machine, state: dict[str, Any], members: dict[str, NDArray[Any]], fresh: bool) -> None:
    ram = vm.memory.words.reshape(-1, 512)
    frames = members["ram_frame"]
    if len(frames) != len(members["ram"]) or np.any(frames >= len(ram)) or np.any(frames[1:] <= frames[:-1]):
        raise SnapshotError("", "frames of RAM within its size, in order, expected")
    if not fresh:
        ram[:] = 0
    ram[frames] = members["ram"]
    for slot in state["logged"]:
        vm.memory.dirty_words(slot)[:] = members[f"log_{slot}"]
    if state["backing"]:
        vm.memory.import_backing([members[name] for name in _BACKING])
    if not isinstance(vm.mmu.design, Native):
        arrays = vm.mmu.arrays
        saved = {name: members[f"mmu_{name}"].reshape(-1) for name in arrays}
        _check_shadow(vm, {name: saved[name].view(arrays[name].dtype).reshape(arrays[name].shape) for name in arrays})
        for cpu in vm.vcpus:
            cpu.import_state(cpu.export_state() | {"roots": [SC_NONE] * 4})
        _write_shadow(vm, saved)
    vm.mmu.import_state(state["mmu"])
    for cpu, registers in zip(vm.vcpus, state["vcpus"], strict=True):
        cpu.import_tlb([members[f"tlb_{cpu.number}_{part}"] for part in range(len(cpu.tlb_arrays))])
        cpu.import_state(registers)


def _restore_plugins(vm: Machine, members: dict[str, NDArray[Any]]) -> None:
    """After all else has been checked: they may look at pages."""
    vm.mmu.import_plugins(
        {name: members[f"plugin_{name}"].tobytes() for name in ("policy", "decides") if f"plugin_{name}" in members}
    )


def _lags(vm: Machine) -> bool:
    """Shadow tables may be unsync, or are the host's: there are large leaves, and state that others do not have."""
    return isinstance(vm.mmu.design, Nested) or (isinstance(vm.mmu.design, Shadow) and vm.mmu.design.lagging)


def _write_shadow(vm: Machine, saved: dict[str, NDArray[Any]]) -> None:
    """What is written is checked when the VM is first used; no array is held beyond this call."""
    for name, array in vm.mmu.writable_arrays().items():
        # Only what is not zero is touched: the large arrays are committed by the host page by page.
        flat, source = array.view(np.uint8).reshape(-1), saved[name]
        touched = np.flatnonzero(source)
        flat[:] = 0
        flat[touched] = source[touched]


def _check_shadow(vm: Machine, arrays: dict[str, Any]) -> None:
    """Every index that the engine follows stays within its array; the audit sees to what they mean."""
    pool = len(arrays["pages"])
    sptes = pool * 512
    pages, table = arrays["pages"], arrays["table"]

    def within(values: NDArray[Any], limit: int, what: str, none: bool = True) -> None:
        if np.any((values >= limit) & ~((values == SC_NONE) & none)):
            raise SnapshotError("", f"{what} within 0 to {limit - 1} expected")

    for name in ("hash_next", "prev", "next"):
        active = pages["active"] != 0
        within(pages[name][active] if name != "next" else pages[name], pool, f"pages.{name}")
    within(pages["active"], 2, "pages.active", none=False)
    within(arrays["hash"], pool, "hash")
    heads = [pages["parents"], arrays["frames"]["rmap"]]
    heads += [arrays[name] for name in ("large_rmap_2m", "large_rmap_1g") if name in arrays]
    for values in heads:
        within(values & ~np.uint32(LIST_MANY), sptes + 1, "list heads", none=False)
        if np.any(values == LIST_MANY):
            raise SnapshotError("", "lists of many sptes that have a first one expected")
    for name in ("prev", "next"):
        within(arrays["links"][name], sptes + 1, f"links.{name}", none=False)
    level = (pages["role"] >> ROLE_LEVEL) & 15
    within(level[pages["active"] != 0] - np.uint32(1), 5, "levels", none=False)
    address = (table & np.uint64(0x000FFFFFFFFFF000)) >> np.uint64(12)
    present = (table & np.uint64(1)) != 0
    large = present & ((table & np.uint64(PTE_PS)) != 0) & (level > 1)[:, None]
    if not _lags(vm):
        large[:] = False
    leaf = present & (level == 1)[:, None] | large
    frame = address - np.uint64(vm.memory.ram_hpa >> 12)
    within(frame[leaf], vm.memory.bytes.size >> 12, "frames that leaves map", none=False)
    link = (table != 0) & (level > 1)[:, None] & ~large
    within(
        (address - np.uint64(vm.memory.pool_hpa >> 12))[link],
        pool,
        "pages that upper entries lead to",
        none=False,
    )
    used = np.unpackbits(pages["used"].view(np.uint8).reshape(pool, 64), axis=1, bitorder="little")
    if np.any(used.astype(bool) != (table != 0)):
        raise SnapshotError("", "bitmaps of used entries that agree with the entries expected")
