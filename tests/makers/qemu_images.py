"""Makes the memory images in data/images: of guests that stand with paging on, by QEMU's own commands.

    python tests/makers/qemu_images.py [FOLDER]

A boot sector reads page tables, made by PageTables, to 0x8000, turns paging on, and halts. It needs qemu-system-x86_64
and binutils. What was made so is kept compressed: tests need none of them.
"""

import json
import lzma
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from shadowcore.pagetables import FORMATS, PageTables

MODES = ("32", "pae", "64")
TABLES, SIZE = 0x8000, 0x8000
PAGES = ((0x400000, 0xA000, "rwu"), (0x401000, 0xB000, "ru"), (0x7FF000, 0xC000, "rw"))
"""Linear addresses, gpas and rights of single pages, beside the first 64 KiB, which are mapped to themselves."""

BOOT = """
    .code16
    .global _start
_start:
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7000, %sp
    mov $0x0220 + {sectors} - 0x20, %ax
    mov $0x8000, %bx
    mov $0x0002, %cx
    mov $0x0000, %dx
    int $0x13
    cli
    lgdt gdt
    mov $0xc0000080, %ecx
    xor %edx, %edx
    mov ${efer}, %eax
    wrmsr
    mov ${cr4}, %eax
    mov %eax, %cr4
    mov ${cr3}, %eax
    mov %eax, %cr3
    mov $0x80010001, %eax
    mov %eax, %cr0
    ljmp $8, $there
    .code{bits}
there:
    hlt
    jmp there
    .balign 8
gdt:
    .word 23
    .long table
    .balign 8
table:
    .quad 0
    .quad {code}
    .quad 0x00cf92000000ffff
    .org 510
    .word 0xaa55
"""


def tables(mode):
    """Memory of the guest up to 64 KiB, with its tables, and the root."""
    memory = np.zeros(TABLES + SIZE, np.uint8)
    made = PageTables(memory, mode, allocate=range(TABLES >> 12, (TABLES + SIZE) >> 12))
    x = "x" if mode == "32" else ""
    for gpa in range(0, TABLES, 4096):
        made.map(gpa, gpa, 4096, "rwx")
    for gva, gpa, rights in PAGES:
        made.map(gva, gpa, 4096, rights + x)
    return memory, made.root


def monitor(path, commands):
    """QEMU's answers to commands, by QMP."""
    with socket.socket(socket.AF_UNIX) as connection:
        for _ in range(100):
            try:
                connection.connect(str(path))
                break
            except OSError:
                time.sleep(0.1)
        file = connection.makefile("rw")
        answers = []
        for name, arguments in [("qmp_capabilities", {}), *commands]:
            file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
            file.flush()
            while "return" not in (answer := json.loads(file.readline())):
                if "error" in answer:
                    raise RuntimeError(answer["error"])
            answers.append(answer["return"])
        return answers[1:]


def make(mode, folder):
    memory, root = tables(mode)
    form = FORMATS[mode]
    long = mode == "64"
    code = 0x00AF9A000000FFFF if long else 0x00CF9A000000FFFF
    text = BOOT.format(
        sectors=SIZE // 512, efer=form.efer, cr4=form.cr4, cr3=root, bits=64 if long else 32, code=hex(code)
    )
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "boot.s").write_text(text)
        subprocess.run(["as", "boot.s", "-o", "boot.o"], cwd=place, check=True)
        subprocess.run(["ld", "-Ttext=0x7c00", "--oformat=binary", "boot.o", "-o", "boot.bin"], cwd=place, check=True)
        disk = (place / "boot.bin").read_bytes()[:512] + memory[TABLES:].tobytes()
        (place / "disk.img").write_bytes(disk.ljust(1474560, b"\0"))
        machine = ["qemu-system-x86_64", "-m", "16", "-display", "none", "-nodefaults", "-no-reboot", "-boot", "a"]
        machine += ["-drive", "format=raw,if=floppy,file=disk.img", "-qmp", "unix:qmp,server=on,wait=off"]
        guest = subprocess.Popen([*machine, "-cpu", "max"], cwd=place)
        try:
            time.sleep(8)
            dump = {"paging": False, "protocol": f"file:{place}/dump", "begin": 0, "length": TABLES + SIZE}
            zlib = {**dump, "protocol": f"file:{place}/kdump", "format": "kdump-zlib"}
            del zlib["begin"], zlib["length"]
            save = {"val": 0, "size": TABLES + SIZE, "filename": f"{place}/raw"}
            found = monitor(
                place / "qmp",
                [
                    ("stop", {}),
                    ("human-monitor-command", {"command-line": "info registers"}),
                    ("human-monitor-command", {"command-line": "info tlb"}),
                    ("dump-guest-memory", dump),
                    ("pmemsave", save),
                    ("dump-guest-memory", zlib),
                ],
            )
        finally:
            guest.kill()
            guest.wait()
        for name in ("dump", "raw"):
            (folder / f"{mode}.{name}.xz").write_bytes(lzma.compress((place / name).read_bytes()))
        (folder / f"{mode}.kdump.xz").write_bytes(lzma.compress((place / "kdump").read_bytes()[:4096]))
        (folder / f"{mode}.tlb.txt").write_text(found[2].replace("\r", ""))
        print(mode, [line for line in found[1].splitlines() if line.startswith(("CR0", "EFER"))])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "data" / "images")
    target.mkdir(exist_ok=True)
    for each in MODES:
        make(each, target)
