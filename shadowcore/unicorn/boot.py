"""Multiboot images."""

from __future__ import annotations

import struct

from ..engine.machine import VM
from ..errors import ConfigError


def load_multiboot(vm: VM, image: bytes, command_line: str = "") -> tuple[int, int]:
    """Put the segments of a multiboot (version 1) ELF into memory; its entry point and the gpa of the information.

    ConfigError for what is no such file, or does not fit.
    """
    at = image[:8192].find(struct.pack("<I", 0x1BADB002))
    if image[:4] != b"\x7fELF" or at < 0 or at % 4:
        raise ConfigError(
            "boot: a multiboot ELF is needed: the magic number is not there, on 4 bytes, in the first 8 KiB"
        )
    wide = image[4] == 2
    try:
        entry, table = struct.unpack_from("<QQ" if wide else "<II", image, 24)
        size, count = struct.unpack_from("<HH", image, 54 if wide else 42)
        end = 0
        for i in range(count):
            head = table + i * size
            if wide:
                kind, _, offset, _, target, filled, total = struct.unpack_from("<IIQQQQQ", image, head)
            else:
                kind, offset, _, target, filled, total = struct.unpack_from("<IIIIII", image, head)
            if kind != 1 or not total:
                continue
            if offset + filled > len(image) or filled > total:
                raise ConfigError(f"boot: program header {i} leads beyond the file")
            vm.write_physical(target, image[offset : offset + filled])
            vm.write_physical(target + filled, bytes(total - filled))
            end = max(end, target + total)
    except struct.error as error:
        raise ConfigError(f"boot: the file is too short: {error}") from None
    if not end:
        raise ConfigError("boot: the file has no segment to load")
    slot = vm.memory.slots[0] if vm.memory.slots else None
    if slot is None or slot.gpa or int(slot.size) < 0x100000:
        raise ConfigError("boot: the first memory slot must hold the first MiB")
    # Below the image: information, command line, memory map.
    info, line, names = 0x9000, 0x9800, 0x9400
    vm.write_physical(line, command_line.encode() + b"\0")
    entries = b"".join(struct.pack("<IQQI", 20, s.gpa, int(s.size), 1) for s in vm.memory.slots if s)
    vm.write_physical(names, entries)
    upper = (int(slot.size) >> 10) - 1024
    fields = (
        struct.pack("<IIIII", 1 | 4 | 64, 640, upper, 0, line) + bytes(24) + struct.pack("<II", len(entries), names)
    )
    vm.write_physical(info, fields)
    return int(entry), info
