"""Memory images of guests: read frame by frame, for as much of their page tables as is needed.

A format is a function in `FORMATS`: it takes the path and the first bytes, and returns a `Dump`, or None if the file is
of another. Registers and mode are the caller's where the file does not tell them.
"""

from __future__ import annotations

import importlib.resources
import io
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Design, check_int
from ..engine.machine import VM
from ..errors import ConfigError, GeneralProtection, TraceError
from ..files import Replacement, check_path
from ..pagetables import CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, EFER_LME, EFER_NXE, P
from ..pagetables import FORMATS as MODES
from ..recording import replay as trace
from ..recording.format import GUEST, OPERATIONS
from ..recording.reader import Reader, is_recording
from .explain import Image, load_image

EFER_LMA = 1 << 10
PAGE = 4096
GFN_MAX = 1 << 32
LINEAR = 0xFFFF_F000


@dataclass(frozen=True)
class Dump:
    """Memory of a guest in a file.

    path: the file. kind: what it is, in words. segments: (gpa, bytes, offset in the file) of each piece.
    registers: cr0, cr3, cr4 and efer, as far as the file tells them.
    """

    path: str
    kind: str
    segments: tuple[tuple[int, int, int], ...]
    registers: Mapping[str, int] = field(default_factory=dict)

    @property
    def nframes(self) -> int:
        """Frames up to the end of the highest piece."""
        return max((gpa + size + PAGE - 1 >> 12 for gpa, size, _ in self.segments), default=0)

    def image(self, cr3: int | None = None, mode: str | None = None, gva: int | None = None) -> Image:
        """The tables below `cr3`, of `mode` (None: as the file tells). gva: those of its walk, and the page it reaches.

        ConfigError where the file does not tell what is not given, TraceError for tables that are not in it.
        """
        known = dict(self.registers)
        if mode is not None:
            if mode not in MODES:
                raise ConfigError(f"mode: one of {', '.join(MODES)} is needed, not {mode!r:.40}")
            form = MODES[mode]
            known |= {"cr0": CR0_PG | CR0_WP | CR0_PE, "cr4": form.cr4}
            known["efer"] = form.efer | (EFER_LMA if form.efer & EFER_LME else 0)
        if cr3 is not None:
            known["cr3"] = cr3
        missing = [f"--{name}" for name, key in (("cr3", "cr3"), ("mode", "cr4")) if key not in known]
        if missing:
            raise ConfigError(f"{self.path}: {' and '.join(missing)} needed, for {self.kind} does not tell")
        if not known["cr0"] & CR0_PG:
            raise ConfigError(f"{self.path}: paging is off in the image; --cr3 and --mode walk tables all the same")
        found = mode or _mode(known)
        with open(self.path, "rb") as file:
            frames = dict(self._tables(file, found, known["cr3"], gva))
        gfns = np.array(sorted(frames), dtype=np.uint32)
        pages = np.frombuffer(b"".join(frames[gfn] for gfn in gfns.tolist()), np.uint8).reshape(-1, PAGE)
        name = Path(self.path).stem
        return Image(name, found, self.nframes, **known, frames=gfns, pages=pages, roots=(known["cr3"],))

    def _tables(self, file: io.BufferedReader, mode: str, cr3: int, gva: int | None) -> Iterator[tuple[int, bytes]]:
        """Frames of tables, level by level; with a gva those that it needs, and the one that it reaches."""
        form = MODES[mode]
        root = cr3 & (LINEAR if form.va_bits == 32 else 0x000F_FFFF_FFFF_F000)
        level, tables = form.levels, {root >> 12}
        dtype = np.dtype(f"<u{form.entry_size}")
        while tables:
            below: set[int] = set()
            for gfn in sorted(tables):
                data = self.frame(file, gfn)
                if data is None:
                    if level == form.levels or gva is not None:
                        raise TraceError(
                            self.path, None, f"a table at gpa {gfn << 12:#x} expected, it is not in the image"
                        )
                    continue  # what leads out of RAM is reported by a walk that goes there
                yield gfn, data
                entries = np.frombuffer(data, dtype)
                if mode == "pae" and level == 3:
                    entries = entries[(cr3 & 0xFE0) >> 3 :][:4]
                if gva is not None:
                    entries = entries[form.index(gva, level) :][:1]
                for value in np.unique(entries[entries & P != 0]).tolist():
                    leaf = form.is_leaf(level, value)
                    if not leaf:
                        below.add(form.address(level, value) >> 12)
                    elif gva is not None:
                        reached = form.address(level, value) | gva & (1 << form.shift(level)) - 1
                        if (page := self.frame(file, reached >> 12)) is not None:
                            yield reached >> 12, page
            tables, level = below, level - 1

    def frame(self, file: io.BufferedReader, gfn: int) -> bytes | None:
        """The 4096 bytes of a frame, None if they are not in the file."""
        for gpa, size, offset in self.segments:
            at = (gfn << 12) - gpa
            if at >= 0 and at + PAGE <= size:
                file.seek(offset + at)
                data = file.read(PAGE)
                if len(data) < PAGE:
                    expected = f"{PAGE} bytes of gfn {gfn:#x} expected at byte {offset + at}, the file is cut short"
                    raise TraceError(self.path, None, expected)
                return data
        return None


def _mode(registers: Mapping[str, int]) -> str:
    if not registers["cr4"] & CR4_PAE:
        return "32"
    if not registers["efer"] & EFER_LMA:
        return "pae"
    return "la57" if registers["cr4"] & CR4_LA57 else "64"


# -- formats -------------------------------------------------------------------------------------------------


def _elf(path: str, head: bytes) -> Dump | None:
    """An ELF core of a guest: PT_LOAD says where memory is, QEMU's note what registers are."""
    if head[:4] != b"\x7fELF":
        return None
    if head[5:6] != b"\x01" or head[4:5] not in (b"\x01", b"\x02"):
        raise TraceError(path, None, "an ELF core of a little-endian machine expected")
    wide = head[4] == 2
    layout, size = ("<HHIQQQIHHHHHH", 48) if wide else ("<HHIIIIIHHHHHH", 36)
    if len(head) < 16 + size:
        raise TraceError(path, None, "an ELF core expected, the file is cut short")
    kind, machine, _, _, phoff, _, _, _, phentsize, phnum, *_ = struct.unpack_from(layout, head, 16)
    if kind != 4 or machine not in (3, 62):
        raise TraceError(path, None, "an ELF core of an x86 machine expected, this is another ELF file")
    total = os.path.getsize(path)
    entry = 56 if wide else 32
    if phentsize < entry or phnum == 0xFFFF or phoff + phentsize * phnum > total:
        raise TraceError(path, None, f"{phnum} program headers expected at byte {phoff}, the file is cut short")
    segments: list[tuple[int, int, int]] = []
    registers: dict[str, int] = {}
    with open(path, "rb") as file:
        file.seek(phoff)
        table = file.read(phentsize * phnum)
        for n in range(phnum):
            if wide:
                what, _, offset, _, gpa, length = struct.unpack_from("<IIQQQQ", table, n * phentsize)
            else:
                what, offset, _, gpa, length = struct.unpack_from("<IIIII", table, n * phentsize)
            if what == 1 and length:
                if offset + length > total:
                    expected = f"{length} bytes of memory expected at byte {offset}, the file is cut short"
                    raise TraceError(path, None, expected)
                segments.append((gpa, length, offset))
            elif what == 4 and not registers:
                file.seek(offset)
                registers = _qemu_note(file.read(min(length, 1 << 20)), machine == 62)
    return _dump(path, "an ELF core of dump-guest-memory", segments, registers)


_QEMU_CR = 8 + 18 * 8 + 10 * 24
"""Bytes before CR0 to CR4 in what QEMU says of a processor: version, size, 18 registers, 10 segments."""


def _qemu_note(notes: bytes, long: bool) -> dict[str, int]:
    """Control registers of the first processor, of a note of QEMU's; {}: there is none. EFER is not in it: LMA is the
    ELF file's machine, and NXE is taken to be set, as kernels of today have it."""
    at = 0
    while at + 12 <= len(notes):
        name, size, _ = struct.unpack_from("<III", notes, at)
        body = at + 12 + (name + 3 & ~3)
        if notes[at + 12 : at + 12 + name].rstrip(b"\0") == b"QEMU" and size >= _QEMU_CR + 40:
            if body + _QEMU_CR + 40 > len(notes):
                return {}
            cr = struct.unpack_from("<5Q", notes, body + _QEMU_CR)
            efer = EFER_LME | EFER_LMA | EFER_NXE if long else EFER_NXE if cr[4] & CR4_PAE else 0
            return {"cr0": cr[0], "cr3": cr[3], "cr4": cr[4], "efer": efer}
        at = body + (size + 3 & ~3)
    return {}


def _lime(path: str, head: bytes) -> Dump | None:
    """LiME: a header of 32 bytes before each piece: magic, version, first and last gpa."""
    if head[:4] != b"EMiL":
        return None
    segments: list[tuple[int, int, int]] = []
    total, at = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while at < total:
            file.seek(at)
            header = file.read(32)
            if len(header) < 32 or header[:4] != b"EMiL":
                gpa, size, _ = segments[-1] if segments else (0, 0, 0)
                behind = (
                    f" behind {size} byte(s) of memory from gpa {gpa:#x}, as the header before says" if segments else ""
                )
                raise TraceError(path, None, f"a header of LiME, or the end, expected at byte {at}{behind}")
            version, first, last = struct.unpack_from("<IQQ", header, 4)
            if version != 1 or last < first or at + 32 + last - first + 1 > total:
                expected = f"memory from {first:#x} to {last:#x} expected behind byte {at}, the file is cut short"
                raise TraceError(path, None, expected if version == 1 else f"version 1 of LiME expected, not {version}")
            segments.append((first, last - first + 1, at + 32))
            at += 32 + last - first + 1
    return _dump(path, "a memory image of LiME", segments, {})


def _kdump(path: str, head: bytes) -> Dump | None:
    """Compressed by makedumpfile's formats, which are not read: no tool turns a compressed one into an ELF core
    (makedumpfile refuses -E for it), and libkdumpfile, which reads it, is no package that pip alone can install."""
    if head.startswith(b"KDUMP   "):
        what, more = "kdump-compressed", ""
    elif head.startswith(b"makedumpfile\0"):
        what, more = (
            "flattened (of QEMU, or makedumpfile -F)",
            "; makedumpfile -R OUT < FILE takes out one that is inside",
        )
    else:
        return None
    how = f"an ELF core is read, as QEMU's dump-guest-memory without -z, -l or -s, and makedumpfile -E, write it{more}"
    raise TraceError(path, None, f"a memory image that is not compressed expected, this is {what}: {how}")


def _raw(path: str, head: bytes) -> Dump | None:
    """Guest physical memory from gpa 0 on, as pmemsave writes it."""
    total = os.path.getsize(path)
    if total < PAGE or total % PAGE:
        return None
    return _dump(path, "a raw memory image", [(0, total, 0)], {})


def _dump(path: str, kind: str, segments: list[tuple[int, int, int]], registers: dict[str, int]) -> Dump:
    made = Dump(path, kind, tuple(segments), registers)
    if not 1 <= made.nframes <= GFN_MAX:
        raise TraceError(path, None, f"memory below gpa {GFN_MAX << 12:#x} expected, and some of it")
    return made


FORMATS: tuple[Callable[[str, bytes], Dump | None], ...] = (_elf, _lime, _kdump, _raw)
"""In the order in which they are asked: last the one that takes what has no mark."""


_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


def has_mark(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself that it is a memory image: all but raw memory do."""
    try:
        if not os.path.isfile(check_path(path)):
            return False  # to open a pipe would be to wait for it
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith((b"\x7fELF", b"EMiL", b"KDUMP   ", b"makedumpfile\0"))


def _check_file(path: str) -> None:
    """TraceError for a pipe or a device, which can be read once, and waited for. OSError for what is not there."""
    if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise TraceError(path, None, "a file expected, not a pipe")


def open_dump(path: str | os.PathLike[str]) -> Dump:
    """A memory image, by its contents: an ELF core, LiME's, or raw memory. TraceError."""
    path = check_path(path)
    try:
        _check_file(path)
        with open(path, "rb") as file:
            head = file.read(4096)
        if head.startswith(_COMPRESSED):
            raise TraceError(path, None, "a memory image expected, this is a compressed file: unpack it first")
        for form in FORMATS:
            found = form(path, head)
            if found is not None:
                return found
    except OSError as error:
        raise TraceError(path, None, f"a readable file expected: {error.strerror}") from None
    expected = "an image expected (.npz, saved VM, recording, ELF core, LiME, raw memory in frames of 4096 bytes)"
    raise TraceError(path, None, f"{expected}, this looks like none")


def machine(
    path: str | os.PathLike[str] | None = None,
    mmu: str | Design | None = None,
    *,
    cr3: int | None = None,
    mode: str | None = None,
    record: int | None = None,
    gva: int | None = None,
) -> VM:
    """A VM that stands where the guest of a file stood: of an .npz image (None: the one in the package), a memory image
    (`open_dump`), a saved VM, or a recording before its record number `record` (None: at its end).

    mmu: a design (None: native; a saved VM has its own, with the shadow as it was). cr3: another root than the file's.
    mode: of a memory image. gva: of a memory image only what this address needs is read. ConfigError for what is of no
    use with the file, or missing; TraceError, SnapshotError.
    """
    found = "image" if path is None else kind(path)
    if record is not None and found != "recording":
        raise ConfigError("record: a recording is needed, an image has none")
    if mode is not None and found != "memory":
        raise ConfigError("mode: a memory image is needed; other files tell their own")
    if path is None or found in ("image", "memory"):
        image = _bundled() if path is None else load_image(path) if found == "image" else None
        if image is None and path is not None:
            image = open_dump(path).image(cr3, mode, gva)
        assert image is not None
        return image.machine(cr3, "native" if mmu is None else mmu)
    if found == "vm":
        if mmu is not None:
            raise ConfigError("mmu: a saved VM has its own design; an image or a recording is needed")
        vm = VM.load(path)
    else:
        vm = _recorded(path, "native" if mmu is None else mmu, record)
    if cr3 is not None:
        try:
            vm.vcpus[0].cr3 = cr3
        except GeneralProtection:
            raise ConfigError(f"cr3: {cr3:#x} with the other registers of the file is #GP") from None
    return vm


BUNDLED = "linux-4level"
"""The image in the package: page tables of a Debian 6.1 kernel in 4-level paging."""


def _bundled() -> Image:
    found = importlib.resources.files(__package__) / "data" / f"{BUNDLED}.npz"
    with importlib.resources.as_file(found) as file:
        return load_image(file)


def kind(path: str | os.PathLike[str]) -> str:
    """Which kind of file this is: "image", "vm", "recording", or else "memory"."""
    path = check_path(path)
    try:
        _check_file(path)
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return "memory"
            with zipfile.ZipFile(file) as archive:
                names = set(archive.namelist())
    except zipfile.BadZipFile:
        raise TraceError(path, None, "a whole archive expected, this is cut short or damaged") from None
    except OSError as error:
        raise TraceError(path, None, f"a readable file expected: {error.strerror}") from None
    if "state.npy" in names:
        return "vm"
    return "recording" if names & {"recording.json", "kind.npy"} else "image"


def _recorded(path: str | os.PathLike[str], mmu: str | Design, record: int | None) -> VM:
    if not is_recording(path):
        return trace.machine_at(trace.open_recording(path), mmu, record)
    with Reader(path) as reader:
        if reader.stream == GUEST:
            return trace.machine_at(trace.open_recording(path), mmu, record)
        if reader.stream != OPERATIONS:
            raise TraceError(
                path, None, "a recording of a guest or of operations expected: programs have no page tables"
            )
        left = reader.records if record is None else check_int("record", record, 0, reader.records)
        vm = trace.machine(reader, mmu)
        for operations in reader.operations():
            if left > 0:
                vm.vcpus[0].run(operations[:left])
            left -= len(operations)
        return vm


def save_image(image: Image, path: str | os.PathLike[str]) -> None:
    """Write an image as the .npz that `load_image` reads. OSError where it cannot be written."""
    members: dict[str, Any] = {
        name: np.uint64(getattr(image, name)) for name in ("nframes", "cr0", "cr3", "cr4", "efer")
    }
    members |= {"mode": np.array(image.mode), "root": np.array(image.roots, np.uint64)}
    members |= {"mem_gfn": image.frames.astype(np.uint32), "mem_page": image.pages}
    with Replacement(path) as file:
        np.savez_compressed(file, **members)
